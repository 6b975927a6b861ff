"""Data made with a tokenizer that is not the model's is refused, unless that tokenizer is named."""

import json
import shutil
from pathlib import Path

import pytest

from megalong.data.builtin import train_tokenizer
from megalong.data.manifest import TokenizerInfo
from megalong.data.same_tokenizer import check_tokenizer
from megalong.data.tokenizer import load_tokenizer
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import DataError
from megalong.training.sequences import open_data
from tests.data.folders import make_folder

TEXT = ["def f(x):\n    return x + 1\n", "the quick brown fox jumps over the lazy dog " * 3]


def tokenizer(folder: Path, vocab_size: int) -> Path:
    folder.mkdir()
    train_tokenizer(TEXT, vocab_size, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer(tmp_path_factory.mktemp("tokenizers") / "model", 300)


def info(folder: Path) -> TokenizerInfo:
    return load_tokenizer(folder).info


def test_the_models_own_tokenizer_passes_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    assert check_tokenizer(info(copy), "data", model, 300, None) is None


def test_another_size_is_refused_and_can_be_allowed_by_name(model: Path, tmp_path: Path) -> None:
    other = info(tokenizer(tmp_path / "other", 280))
    with pytest.raises(DataError, match=r"280 tokens instead of 300, .*data\.allow_tokenizer=other"):
        check_tokenizer(other, "data", model, 300, None)
    with pytest.raises(DataError):
        check_tokenizer(other, "data", model, 300, "model")
    told = check_tokenizer(other, "data", model, 300, "other")
    assert told is not None
    assert "was not made with the model's tokenizer" in told


def test_another_end_of_text_is_refused_though_the_vocabulary_is_the_same(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"eos_token": "a"}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match=r"end of text \d+ instead of 0"):
        check_tokenizer(info(other), "data", model, 300, None)


def test_other_merges_of_the_same_size_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    train_tokenizer(["zyx wvu tsr " * 30], 300, tmp_path / "other")
    with pytest.raises(DataError, match=r"SHA-256"):
        check_tokenizer(info(tmp_path / "other"), "data", model, 300, None)


@pytest.mark.parametrize(("tokens", "rows", "refused"), [(3000, 4096, True), (4000, 4096, False), (300, 300, False)])
def test_weights_without_a_tokenizer_are_compared_by_size(
    tmp_path: Path, tokens: int, rows: int, refused: bool
) -> None:
    used = TokenizerInfo(name="other", sha256="0" * 64, vocab_size=tokens, eos_token_id=0)
    if refused:
        with pytest.raises(DataError, match="3,000 tokens, and the model has 4,096 rows"):
            check_tokenizer(used, "data", tmp_path, rows, None)
    else:
        told = check_tokenizer(used, "data", tmp_path, rows, None)
        assert told is not None
        assert "is not known" in told


def test_the_run_asks_before_it_trains(model: Path, tmp_path: Path) -> None:
    make_folder(tmp_path / "data", [257] * 40, 256, held_out=[257] * 4)
    settings = ["+stage=65k", "+scale=mini", f"data.path={tmp_path / 'data'}", "train.steps=5"]
    with pytest.raises(DataError, match="made with tokenizer counting, which is not the model's own"):
        open_data(run_of(settings, 1), [], model)
    told: list[str] = []
    open_data(run_of([*settings, "data.allow_tokenizer=counting"], 1), told, model)
    assert any("data.allow_tokenizer=counting" in text for text in told)
