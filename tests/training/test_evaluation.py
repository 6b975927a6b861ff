"""Evaluation inside a run finds what transformers and tools/evaluate.py find, and training does not notice it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.convert.to_hf import megatron_to_hf
from megalong.data.builtin import train_tokenizer
from megalong.data.dataset import SequenceDataset
from megalong.evaluation.checkpoint import evaluation_run, find_checkpoint, layout_for, opened
from megalong.evaluation.documents import short_pieces, short_samples
from megalong.evaluation.evaluate import Material, evaluate_model
from megalong.evaluation.haystack import BUILTIN, read_haystack
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.results import StageEvaluation, evaluation_from, read_evaluation
from megalong.evaluation.sample import Slot
from megalong.evaluation.scores import Evaluation
from megalong.evaluation.suite import Grid, Suite, make_suite, results
from megalong.evaluation.tokens import PromptTokenizer
from megalong.runtime.ranks import RankPool
from megalong.training import evaluate, questions
from megalong.training.curves import described
from tests.data.folders import VOCAB, make_folder
from tests.evaluation.models import transformers_slots
from tests.llamas import hf_config, save_hf
from tests.training.runs import metrics, same, stage_run, state_of

WINDOW, BASE_WINDOW, LENGTHS = 256, 32, (200, 256)
SHAPE = {"vocab_size": VOCAB, "num_hidden_layers": 2, "rope_theta": 10000.0, "max_position_embeddings": BASE_WINDOW}
EVALUATED = ["data.eval_sequences=2", "evaluation.every_steps=1", "evaluation.tasks=[recall,mrcr]"]
EVALUATED += [f"evaluation.lengths={list(LENGTHS)}", "evaluation.depths=[0.2,0.9]"]
TOLERANCE = 1e-4


class Ran(NamedTuple):
    """One rank after a run."""

    state: dict[str, torch.Tensor]
    modes: set[bool]
    """`training` of all modules."""
    said: list[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of window 32 with a tokenizer of English, and data of documents longer than that."""
    where = tmp_path_factory.mktemp("evaluated")
    save_hf(where / "base", hf_config(**SHAPE))
    train_tokenizer([BUILTIN.read_text()], 384, where / "base")
    make_folder(where / "data", [100] * 60, WINDOW, [90] * 12)
    return where


def trained(folder: str, name: str, *overrides: str, steps: int = 4) -> Ran:
    """A run of the whole trainer on this rank."""
    said: list[str] = []
    evaluate.say = questions.say = said.append  # type: ignore[assignment]
    shape = {k: v for k, v in hf_config(**SHAPE).items() if k not in ("architectures", "model_type")}
    shape |= {"rope_theta": SHAPE["rope_theta"]}
    given = [f"model.{key}={value}" for key, value in shape.items()]
    given += [f"init_from={folder}/base", f"data.path={folder}/data", "data.allow_tokenizer=counting"]
    given += ["data.max_passes=9", f"train.steps={steps}", "train.global_batch_size=2", "precision=fp32"]
    stage = stage_run(f"{folder}/{name}", *given, *overrides)
    stage.run()
    return Ran(state_of(stage), {m.training for chunk in stage.state.model for m in chunk.modules()}, said)


TRAINED = ["topology.tp=2", "topology.cp=2", "attention.document_mask=intra", "train.stop_after=2"]
RESUMED = ["topology.cp=2", "topology.pp=2", "attention.document_mask=intra"]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, folder: Path) -> dict[str, list[Ran]]:
    """Two steps without evaluation; the same evaluated after each, and resumed to four on another layout."""
    return {
        "plain": ranks.run(trained, 4, str(folder), "plain", *TRAINED),
        "begun": ranks.run(trained, 4, str(folder), "run", *TRAINED, *EVALUATED),
        "resumed": ranks.run(trained, 4, str(folder), "run", *RESUMED, *EVALUATED),
    }


def test_training_does_not_notice_that_it_is_evaluated(runs: dict[str, list[Ran]], folder: Path) -> None:
    assert same([r.state for r in runs["plain"]], [r.state for r in runs["begun"]])
    assert metrics(folder / "plain") == metrics(folder / "run")[:2]
    assert [r.modes for r in (*runs["begun"], *runs["resumed"])] == [{True}] * 8


def asked_of(folder: Path) -> tuple[Suite, list[torch.Tensor]]:
    tokenizer = PromptTokenizer(folder / "base")
    left_out: list[str] = []
    grid = Grid(("recall", "mrcr"), LENGTHS, (0.2, 0.9), samples=1)
    suite = make_suite(grid, tokenizer, read_haystack(None, tokenizer), left_out)
    assert {c.task for c in suite.cells} == {"recall"}
    return suite, short_pieces(SequenceDataset(folder / "data", "eval"), 2, BASE_WINDOW)


def of_checkpoint(run_dir: str, material: Material) -> Evaluation:
    checkpoint = find_checkpoint(Path(run_dir))
    run = evaluation_run(checkpoint.model, layout_for(1, 1, 1, 1), precision="fp32")
    with opened(checkpoint, run) as model:
        return evaluate_model(run, model, material, "saved")[0]


def close(value: float | None) -> Any:
    return pytest.approx(value, abs=TOLERANCE)


def test_what_it_finds_is_what_the_saved_checkpoint_gives_and_what_transformers_computes(
    runs: dict[str, list[Ran]], ranks: RankPool, folder: Path, tmp_path: Path
) -> None:
    suite, short = asked_of(folder)
    found = read_evaluation(folder / "run")
    assert found.asked_after is not None
    assert found.base_window == BASE_WINDOW
    (saved,) = ranks.run(of_checkpoint, 1, str(folder / "run"), Material(suite, short=short))
    megatron_to_hf(folder / "run", tmp_path / "hf")
    slots = transformers_slots(tmp_path / "hf", suite.samples, suite.slots)
    alone = results(suite, [Slot(loss, int(hits), int(tokens), 0) for loss, hits, tokens in slots])
    for here, there, served in zip(found.asked_after.cells, saved.cells, alone, strict=True):
        assert asdict(here) == asdict(there) | {"loss": close(there.loss)}
        assert asdict(here) == asdict(served) | {"loss": close(served.loss)}
    assert found.asked_after.short_loss == close(saved.short_loss)
    ((loss, _, tokens),) = transformers_slots(tmp_path / "hf", short_samples(short), 1)
    assert found.asked_after.short_loss == close(loss / tokens)
    ((loss, _, tokens),) = transformers_slots(folder / "base", short_samples(short), 1)
    assert found.short_loss_start == close(loss / tokens)
    assert found.asked_before is not None
    assert abs(found.asked_before.short_loss - found.short_loss_start) > 50 * TOLERANCE


def test_each_step_is_evaluated_once_and_a_resume_keeps_what_was_found(
    runs: dict[str, list[Ran]], folder: Path
) -> None:
    found = read_evaluation(folder / "run")
    assert [m.step for m in found.under_way] == [1, 2, 3]
    losses = [found.asked_before, *(m.asked for m in found.under_way), found.asked_after]
    assert len({asked.short_loss for asked in losses if asked is not None}) == 5
    lines = [line for when in ("begun", "resumed") for line in runs[when][0].said]
    about = [line.split(":")[0] for line in lines if "recall" in line and "texts of 32 tokens" in line]
    assert about == ["before the stage", *(f"after step {i} of 4" for i in (1, 2, 3)), "after the stage"]
    assert "recall 0/2 at 200, recall 0/2 at 256, loss on texts" in lines[2]
    assert [line for line in runs["begun"][0].said if line.startswith("left out")] == lines[:1]
    assert lines[0].count("mrcr at") == 2
    assert all(run.said == runs["begun"][0].said for run in runs["begun"])


def test_tensorboard_has_the_curves_and_a_heat_map_of_every_evaluation(
    runs: dict[str, list[Ran]], folder: Path
) -> None:
    board = EventAccumulator(str(folder / "run" / "tensorboard"), {"images": 0})  # all of them
    board.Reload()
    found = read_evaluation(folder / "run")
    losses = [found.before, *(m.position for m in found.under_way), found.after]
    curve = board.Scalars("evaluation/last_quarter_loss")
    assert [(e.step, e.value) for e in curve] == [(i, pytest.approx(x.last_quarter)) for i, x in enumerate(losses)]
    for tag in ("evaluation/short_loss", "evaluation/recall_accuracy"):
        assert [e.step for e in board.Scalars(tag)] == [0, 1, 2, 3, 4]
    assert "recall: share of answers" in described("evaluation/recall_accuracy")
    for tag in ("evaluation/recall", "evaluation/loss_by_position"):
        assert [e.step for e in board.Images(tag)] == [0, 1, 2, 3, 4]
    assert [line["step"] for line in metrics(folder / "run")] == [1, 2, 3, 4]


def stopped(folder: str, name: str, at: float, *overrides: str) -> tuple[int, list[str]]:
    """A run of three steps without tokenizer that is asked to stop during step `at`, or in the evaluation half a step
    after it; its exit code, what it says."""
    said: list[str] = []
    evaluate.say = questions.say = said.append  # type: ignore[assignment]
    given = ["model.num_hidden_layers=1", "train.global_batch_size=1", "train.steps=3", "data.eval_sequences=1"]
    stage = stage_run(f"{folder}/{name}", *given, "evaluation.every_steps=2", *overrides)
    counting = stage.beside.counting

    def before_a_step() -> Any:
        if stage.state.step == at - 1:
            stage.stop._name = "SIGTERM"
        return counting()

    def in_an_evaluation(*given: Any) -> Any:
        if stage.state.step == at - 0.5:
            stage.stop._name = "SIGTERM"
        return position(*given)

    stage.beside.counting = before_a_step  # type: ignore[method-assign]
    position, evaluate.evaluate = evaluate.evaluate, in_an_evaluation
    try:
        return stage.run(), said
    finally:
        evaluate.evaluate = position


def test_a_signal_comes_before_an_evaluation_which_the_next_start_makes_up_for(ranks: RankPool, tmp_path: Path) -> None:
    def run(at: int, *overrides: str) -> tuple[int, list[str], StageEvaluation]:
        (found,) = ranks.run(stopped, 1, str(tmp_path), "run", at, *overrides)
        return *found, read_evaluation(tmp_path / "run")

    code, said, first = run(2)
    assert (code, first.under_way, first.asked_before.cells) == (85, [], [])
    assert said[0] == "left out of the evaluation: needle: the weights came without a tokenizer"
    assert sum("left out" in line for line in said) == 1
    code, said, second = run(3, "evaluation.samples=2")
    assert (code, [m.step for m in second.under_way], second.after) == (85, [2], None)
    assert [line.split(":")[0] for line in said[1:]] == ["after step 2 of 3"] * 2
    code, said, third = run(9)
    assert (code, third.under_way, third.after is None) == (0, second.under_way, False)
    assert (third.before, third.asked_before) == (first.before, first.asked_before)
    assert run(9) == (0, [], third)


def test_a_signal_in_the_middle_of_an_evaluation_leaves_it_to_the_next_start(ranks: RankPool, tmp_path: Path) -> None:
    ((code, _),) = ranks.run(stopped, 1, str(tmp_path), "run", 2.5)
    assert (code, read_evaluation(tmp_path / "run").under_way) == (85, [])
    ((code, _),) = ranks.run(stopped, 1, str(tmp_path), "run", 3.5)
    found = read_evaluation(tmp_path / "run")
    assert (code, [m.step for m in found.under_way], found.after) == (85, [2], None)


def test_what_was_written_before_there_were_questions_is_still_read(runs: dict[str, list[Ran]], folder: Path) -> None:
    raw = json.loads((folder / "run" / "evaluation.json").read_text())
    old = evaluation_from({key: raw[key] for key in ("seq_length", "before", "after")})
    assert (old.asked_before, old.asked_after, old.under_way, old.short_loss_start) == (None, None, [], None)


def test_short_texts_lie_inside_one_document_and_are_cut_to_the_base_window(tmp_path: Path) -> None:
    make_folder(tmp_path / "long", [600], 512, [100, 20, 300, 93])
    data = SequenceDataset(tmp_path / "long", "eval")
    pieces = short_pieces(data, 1, 32)
    assert [len(piece) for piece in pieces] == [33] * (3 + 9 + 2)
    assert all((piece[1:] == piece[:-1] + 1).sum() >= 31 for piece in pieces)  # the last token of a document is 0
    assert [len(piece) for piece in short_pieces(data, 1, 400)] == [100, 20, 300, 93]
    assert len(short_pieces(data, 1, 16)) == 16


def curve_of(folder: str, name: str, *overrides: str) -> LossByPosition:
    given = [f"data.path={folder}/data", "data.allow_tokenizer=counting", "data.eval_sequences=3", "precision=fp32"]
    stage = stage_run(f"{folder}/{name}", *given, f"model.vocab_size={VOCAB}", "model.num_hidden_layers=1", *overrides)
    assert stage.data.held_out is not None
    return evaluate.evaluate(stage.settings, stage.state.model, stage.data.held_out.parts[0])


def test_each_held_out_sequence_has_its_own_loss_on_any_layout(ranks: RankPool, folder: Path) -> None:
    (alone,) = ranks.run(curve_of, 1, str(folder), "alone")
    two = ranks.run(curve_of, 2, str(folder), "two", "topology.dp=2")
    rings = ranks.run(curve_of, 4, str(folder), "rings", "topology.cp=2", "topology.dp=2")
    assert len(set(alone.sequences)) == 3
    assert alone.last_quarter == pytest.approx(sum(alone.sequences) / 3)
    for curve in (*two, *rings):
        assert curve.sequences == [*(pytest.approx(x, abs=1e-5) for x in alone.sequences), None]
        assert curve.spread == [pytest.approx(x, abs=1e-5) for x in alone.spread]
