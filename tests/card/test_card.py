"""A card says what the runs wrote, says what is missing, and its code runs as it is printed."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGUFReader
from huggingface_hub import ModelCard
from matplotlib.image import imread
from typer.testing import CliRunner

from megalong.card.card import make_card
from megalong.card.lineage import lineage
from megalong.card.writing import write_card
from megalong.checkpoint.checksums import read_checksums, write_checksums
from megalong.commands.convert import app
from megalong.convert.to_hf import megatron_to_hf
from megalong.convert.weights import open_weights
from megalong.data.manifest import MANIFEST_NAME
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.results import Asked, read_evaluation
from megalong.evaluation.scores import Evaluation
from megalong.evaluation.suite import CellResult
from megalong.runtime.errors import CheckpointError, DataError
from megalong.runtime.files import sha256_of
from megalong.runtime.ranks import RankPool
from tests.convert.tokenizers_of_llamas import write_llama3
from tests.data.folders import make_folder
from tests.llamas import hf_config, save_hf
from tests.training.runs import outcome_of

SHAPE = {"vocab_size": 1040, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
FRONT = "---\nlicense: llama3\nlanguage:\n- en\nbase_model: someone/else\n---\n# base\n"
WINDOWS = {"65k": 256, "262k": 1024}


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and two stages from it: 65k and 262k at mini scale, two steps each."""
    folder = tmp_path_factory.mktemp("card")
    save_hf(folder / "base", hf_config(**SHAPE, max_position_embeddings=32))
    write_llama3(folder / "base")
    (folder / "base" / "README.md").write_text(FRONT)
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": "meta-llama/base"}))
    before = folder / "base"
    for name, window in WINDOWS.items():
        make_folder(folder / f"data-{name}", [3 * window] * 6, window, [2 * window])
        settings = [f"init_from={before}", f"data.path={folder / f'data-{name}'}", "data.allow_tokenizer=counting"]
        settings += ["model.vocab_size=1040", "train.steps=2", "train.global_batch_size=2", "data.eval_sequences=1"]
        (said,) = ranks.run(outcome_of, 1, str(folder / name), *settings, "precision=fp32", stage=name)
        assert said == "done"
        before = folder / name
    return folder


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Path:
    """The last run alone, to be damaged."""
    return Path(shutil.copytree(runs / "262k", tmp_path / "262k"))


def text_of(files: dict[str, bytes]) -> str:
    return files["README.md"].decode()


def row(text: str, title: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_front_matter_is_the_hub_s_and_carries_the_base_s_licence(runs):
    card = ModelCard(text_of(make_card(runs / "262k", "Long Llama")))
    assert card.data.model_name == "Long Llama"
    assert card.data.license == "llama3"
    assert card.data.language == ["en"]
    assert card.data.base_model == "meta-llama/base"
    assert card.data.library_name == "transformers"
    assert card.text.strip().startswith("# Long Llama")


def test_every_number_of_the_training_table_is_one_that_the_runs_wrote(runs):
    text = text_of(make_card(runs / "262k"))
    assert text_of(make_card(runs / "262k")) == text
    assert row(text, "Initialize from") == ["`base`", "65k"]
    assert row(text, "Sequence length") == ["256", "1,024"]
    assert row(text, "Sequence length 2^N") == ["8", "10"]
    assert row(text, "Total tokens") == ["1,024", "4,096"]
    assert row(text, "Steps") == ["2", "2"]
    assert row(text, "Batch size") == ["1", "1"]
    assert row(text, "Gradient accumulation steps") == ["2", "2"]
    assert row(text, "Learning rate") == ["5.00e-04", "5.00e-04"]
    found = [
        [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()] for name in WINDOWS
    ]
    minutes = [sum(record["seconds"] for record in records) / 60 for records in found]
    assert row(text, "Minutes to train (wall)") == [f"{m:.3g}" for m in minutes]
    for name, value in zip(WINDOWS, minutes, strict=True):
        assert f"- {name}: {value / 60:.3g} rank hours (measured)" in text
    evaluations = [json.loads((runs / name / "evaluation.json").read_text()) for name in WINDOWS]
    losses = [e["after"]["loss"][-4:] for e in evaluations]
    assert [float(cell) for cell in row(text, "Loss, last quarter: after")] == pytest.approx(
        [sum(part) / 4 for part in losses], abs=1e-4
    )
    for name in WINDOWS:
        assert sha256_of(runs / f"data-{name}" / MANIFEST_NAME) in text
    for word in ("torch", "megatron-core", *(("commit",) if (Path(__file__).parents[2] / ".git").exists() else ())):
        assert row(text, word)[0] not in ("", "not recorded")


def test_pictures_that_it_shows_are_there_and_can_be_drawn(runs, tmp_path):
    files = make_card(runs / "262k")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text_of(files))
    assert shown == ["images/loss_by_position.png", "images/needle.png"]
    write_card(files, tmp_path / "card")
    assert all(imread(tmp_path / "card" / name).ndim == 3 for name in shown)


def edit_config(run_dir: Path, changes: dict[str, str]) -> None:
    """Change the text of a run's configuration, in its checkpoint too."""
    (step,) = (run_dir / "checkpoints").glob("step_*")
    text = (run_dir / "config.yaml").read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    for path in (run_dir / "config.yaml", step / "config.yaml"):
        path.write_text(text)
    entry = {"bytes": len(text.encode()), "sha256": sha256_of(step / "config.yaml")}
    write_checksums(step, {**(read_checksums(step) or {}), "config.yaml": entry})


def test_what_is_missing_is_said_to_be_missing(runs, copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    (copy / "evaluation.json").unlink()
    edit_config(copy, {str(runs / "65k"): "/gone/65k", str(runs / "data-262k"): "/gone/data"})
    text = text_of(make_card(copy))
    assert row(text, "Minutes to train (wall)") == ["missing"]
    assert row(text, "Loss, last quarter: after") == ["missing"]
    for words in (
        "Missing: no stage was evaluated",
        "Missing: `tools/evaluate.py` was not run on it",
        "- 262k: rank hours are missing",
        "- energy: not measured",
        "metrics.jsonl has 1 of 2 steps",
        "`/gone/65k` is not there any more",
        "There is no data folder /gone/data",
    ):
        assert words in text, words


def test_a_stage_that_is_not_finished_says_so(copy):
    edit_config(copy, {"train:\n  steps: 2\n": "train:\n  steps: 9\n"})
    assert "**The stage is not finished: this is step 2 of 9.**" in text_of(make_card(copy))


def scores(window: int, theta: float) -> dict:
    cells = [CellResult("needle", length, depth, 2, 0.5, 0.5, 1.0) for length in (256, 1024) for depth in (0.0, 0.5)]
    curve = LossByPosition([0, 512, 1024], [3.0, 2.0], 2.0)
    return Evaluation("262k", window, theta, cells, curve, 9.0, None, 2.5).as_json()


def test_needles_and_short_context_are_shown_where_they_were_measured(runs, copy, tmp_path):
    theta = lineage(copy).stages[-1].info.theta
    base = scores(32, 10000.0) | {"name": "base", "short_loss": 2.25, "cells": []}
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"checkpoints": [scores(1024, theta)], "base": base}))
    files = make_card(copy, evaluation=path)
    assert "images/needle.png" in files
    assert "![needles by depth and length](images/needle.png)" in text_of(files)
    assert "above the base (base)" in text_of(files)
    assert "+0.2500" in text_of(files)
    path.write_text(json.dumps({"checkpoints": [scores(2048, theta)], "base": None}))
    with pytest.raises(DataError, match=r"is about 262k \(2,048 tokens.*not about a model of 1,024 tokens"):
        make_card(copy, evaluation=path)


def test_what_the_runs_asked_is_shown_where_nobody_has_asked_since(runs, copy):
    text = text_of(make_card(copy))
    found = [read_evaluation(runs / "65k"), read_evaluation(copy)]
    losses = [[e.short_loss_start, e.asked_before.short_loss, e.asked_after.short_loss] for e in found]
    titles = ("starting weights with their own theta", "before", "after")
    for title, values in zip(titles, zip(*losses, strict=True), strict=True):
        assert row(text, f"Loss on them, {title}") == [f"{value:.4f}" for value in values]
    assert row(text, "Short texts, tokens") == ["32", "32"]
    assert row(text, "Harm to short contexts, nats per token") == [f"{after - at:+.4f}" for at, _, after in losses]
    cells = [CellResult("needle", 1024, depth, 2, 0.5, 0.5, 1.0) for depth in (0.1, 0.9)]
    before, after = Asked([], None), replace(found[1].asked_after, cells=cells)
    replace(found[1], asked_before=before, asked_after=after, short_loss_start=None).write(copy)
    text = text_of(make_card(copy))
    assert row(text, "needle at 1,024, before -> after") == ["-", "missing -> 2/4"]
    assert "![needle: answers found by depth and length](images/needle.png)" in text
    assert "Missing: the harm to short contexts." in text
    replace(found[1], asked_before=before, asked_after=before).write(copy)
    files = make_card(copy)
    assert "images/needle.png" not in files
    assert "Missing: the last stage asked for nothing that lies at a depth." in text_of(files)


def test_what_is_no_run_is_refused(runs, tmp_path):
    with pytest.raises(CheckpointError, match="is no run_dir"):
        make_card(runs / "base")


def test_a_card_that_somebody_has_edited_is_left_alone(runs, tmp_path):
    files = make_card(runs / "262k")
    write_card(files, tmp_path)
    write_card(files, tmp_path)
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.raises(CheckpointError, match="was written or changed by somebody"):
        write_card(files, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine\n"


@pytest.fixture(scope="module")
def export(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of the last run."""
    out = tmp_path_factory.mktemp("export") / "Mini-262k"
    result = CliRunner().invoke(app, ["megatron-to-hf", str(runs / "262k"), str(out)])
    assert result.exit_code == 0, result.output
    assert f"model card: {out / 'README.md'}" in result.output
    return out


def test_an_export_has_its_card_and_may_be_edited_and_replaced(runs, export, tmp_path):
    out = Path(shutil.copytree(export, tmp_path / "Mini-262k"))
    assert ModelCard.load(out / "README.md").data.model_name == "Mini-262k"
    assert imread(out / "images/loss_by_position.png").ndim == 3
    megatron_to_hf(runs / "262k", out, overwrite=True)
    assert not (out / "README.md").exists()
    write_card(make_card(runs / "262k", "again"), out)
    (out / "README.md").write_text("# mine\n")
    with open_weights(out) as weights:
        assert "right" in weights.check_files()
    with pytest.raises(CheckpointError, match=r"README\.md was changed|README\.md has"):
        megatron_to_hf(runs / "262k", out, overwrite=True)
    result = CliRunner().invoke(app, ["megatron-to-hf", str(runs / "262k"), str(tmp_path / "bare"), "--no-card"])
    assert result.exit_code == 0
    assert not (tmp_path / "bare" / "README.md").exists()


def test_the_code_of_a_card_runs_as_it_is_printed(export, monkeypatch, capsys):
    monkeypatch.chdir(export.parent)
    blocks = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    assert "apply_chat_template" in blocks[1]
    for code in blocks:
        exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.startswith("The needle is")


def test_a_gguf_of_a_run_says_where_it_comes_from(runs, tmp_path):
    result = CliRunner().invoke(app, ["megatron-to-gguf", str(runs / "262k"), str(tmp_path / "Long.gguf")])
    assert result.exit_code == 0, result.output
    said = {name: field.contents() for name, field in GGUFReader(tmp_path / "Long.gguf").fields.items()}
    assert said["general.name"] == "Long"
    assert said["general.license"] == "llama3"
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/base"
    assert (said["megalong.stage"], said["megalong.step"]) == ("262k", "2")
    assert said["llama.context_length"] == 1024


@pytest.mark.parametrize("page", ["docs/conversion.md", "README.md"])
def test_the_pages_code_for_an_export_runs_as_it_is_printed(page, export, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / page).read_text()
    blocks = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "transformers" in code]
    if page == "docs/conversion.md":
        assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        for name in set(re.findall(r'"(Llama-3-8B-[^"]*)"', code)):
            if not Path(name).exists():
                Path(name).symlink_to(export)
        exec(compile(code, page, "exec"), {})
    assert capsys.readouterr().out.strip() or not blocks


def test_llama_cpp_s_lines_name_what_the_converter_makes(export, monkeypatch):
    monkeypatch.chdir(export.parent)
    (line,) = re.findall(r"^python tools/convert\.py (.*)$", (export / "README.md").read_text(), re.MULTILINE)
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    assert (export.parent / "Mini-262k.gguf").is_file()
