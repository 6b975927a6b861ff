"""The command turns a person's text into a folder that trains, and says what is wrong with what it cannot read."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megalong.data.builtin import python_sources, train_tokenizer
from megalong.data.dataset import SequenceDataset
from megalong.data.prepare import prepare
from megalong.runtime.errors import DataError

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
L = 128


@pytest.fixture(scope="module")
def texts() -> list[str]:
    whole = [t for _, t in zip(range(4), python_sources(10**6), strict=False)]
    return [t[i : i + 3000] for t in whole for i in range(0, len(t), 3000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 400, folder)
    return folder


def _lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "meta": {"redpajama_set_name": "Book"}}) + "\n" for t in texts))
    return path


def test_json_lines_and_text_files_of_the_same_documents_give_the_same_sequences(tmp_path, texts, tokenizer):
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "files" / f"{i:04}.txt").write_text(text)
    _lines(tmp_path / "all.jsonl", texts)
    one = prepare(tmp_path / "files", tmp_path / "a", tokenizer, L, eval_fraction=0.2, progress=False)
    two = prepare(
        tmp_path / "all.jsonl", tmp_path / "b", tokenizer / "tokenizer.json", L, eval_fraction=0.2, progress=False
    )
    assert (one.train, one.eval) == (two.train, two.eval)


def test_the_command_writes_the_text_back_out_of_the_folder(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts)
    command = [sys.executable, str(TOOL), str(source), str(tmp_path / "data"), "--tokenizer", str(tokenizer)]
    done = subprocess.run([*command, "--seq-length", str(L), "--eval-fraction", "0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sequences of 128 tokens to train on" in done.stdout
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    for split in ("train", "eval"):
        dataset = SequenceDataset(tmp_path / "data", split)
        for i in range(len(dataset)):
            starts = [*dataset.document_starts(i).tolist(), dataset.valid_length(i)]
            for a, b in pairwise(starts):
                piece = decode(dataset.read(i, a, b).tolist())
                assert any(piece.strip("�") in t for t in texts)


def test_a_held_out_text_is_held_out_of_every_window_and_order(tmp_path, texts, tokenizer):
    def held_out(name: str, order: list[str], seq_length: int) -> set[bytes]:
        prepare(_lines(tmp_path / f"{name}.jsonl", order), tmp_path / name, tokenizer, seq_length, eval_fraction=0.2)
        dataset = SequenceDataset(tmp_path / name, "eval")
        tokens = [dataset.read(i, 0, dataset.valid_length(i)) for i in range(len(dataset))]
        return set(np.concatenate(tokens).tobytes().split(b"\0" * 4))

    short = sum(map(len, held_out("a", texts, 64)))
    long = sum(map(len, held_out("b", texts[::-1], 256)))
    assert abs(short - long) < 0.05 * short  # rows overlap by one token, so more short rows hold a little more


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r'a.jsonl:2: not a JSON object with a "text" field'),
        ("a.jsonl", b'{"text": "x"}\n{"te', r"a.jsonl:2: not a JSON"),
        ("a.jsonl", b'{"text": 3}\n', r'a.jsonl:1: "text" is int'),
        ("a.txt", b"caf\xe9 noir", r"a.txt is not UTF-8 text .*byte 3"),
        ("a.jsonl.zst", b"(\xb5/\xfd", "Unpack the compressed files first"),
        ("a.txt", b"x", "gives no (train|eval) sequence"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tokenizer, name, content, words):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare(tmp_path / "source", tmp_path / "out", tokenizer, L, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path, tokenizer):
    command = [sys.executable, str(TOOL), str(tmp_path / "no"), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    done = subprocess.run([*command, "--seq-length", "64"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"There is no source {tmp_path / 'no'}."


def test_wrong_settings_are_refused_before_any_work(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts)
    for words, arguments in (
        ("eval_fraction=1.5", {"eval_fraction": 1.5}),
        ("seq_length=0", {"seq_length": 0}),
        ("There is no tokenizer at", {"tokenizer": tmp_path}),
        ("exists already", {"out": source}),
    ):
        given = {"source": source, "out": tmp_path / "out", "tokenizer": tokenizer, "seq_length": L, **arguments}
        with pytest.raises(DataError, match=words):
            prepare(**given, progress=False)
