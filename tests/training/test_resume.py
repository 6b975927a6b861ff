"""Stopping and resuming changes nothing: six steps are three and three, bit for bit."""

from pathlib import Path

import pytest
import torch

from megalong.checkpoint import pointer
from megalong.checkpoint.load import verify_checksums
from megalong.runtime.errors import CheckpointError
from megalong.runtime.ranks import RankPool
from tests.training.runs import metrics, run_stage, same
from tests.variants import long_but

EVALUATED = "data.eval_sequences=2"


def test_six_steps_are_three_a_stop_and_three_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    layout = ["topology.tp=2", "topology.cp=2", EVALUATED]
    unbroken = ranks.run(run_stage, 4, str(tmp_path / "a"), *layout)
    ranks.run(run_stage, 4, str(tmp_path / "b"), *layout, "train.stop_after=3")
    assert len(metrics(tmp_path / "b")) == 3
    resumed = ranks.run(run_stage, 4, str(tmp_path / "b"), *layout)
    assert any(k.startswith("optimizer") and k.endswith("exp_avg_sq") for k in unbroken[0])
    assert same(unbroken, resumed)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a/evaluation.json").read_text() == (tmp_path / "b/evaluation.json").read_text()


def test_two_runs_of_one_config_are_bit_identical(ranks: RankPool, tmp_path: Path) -> None:
    runs = [ranks.run(run_stage, 2, str(tmp_path / name), "train.stop_after=2", "precision=fp32") for name in "ab"]
    assert same(*runs)


CHANGES = {
    "tp2 to cp4": ((2, "topology.tp=2"), (4, "topology.cp=4")),
    "dp4 to tp2 dp2": ((4, "topology.dp=4"), (4, "topology.tp=2", "topology.dp=2")),
    "pp2 to pp1": ((2, "topology.pp=2"), (1, "topology.pp=1")),
    "4 to 8 ranks": ((4, "topology.cp=2", "topology.dp=2"), (8, "topology.tp=2", "topology.cp=2", "topology.dp=2")),
    "tp2 to cp2 pp2": ((2, "topology.tp=2"), (4, "topology.cp=2", "topology.pp=2")),
}


def samples_read(run_dir: str, *overrides: str) -> list[int]:
    """Sequences that this data-parallel rank would read next."""
    from itertools import islice

    from megatron.core import parallel_state

    from megalong.data.order import shuffled_samples
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, *overrides)
    run, state = stage.settings, stage.state
    here = shuffled_samples(
        sequences=len(stage.data.train.main),
        seed=run.config.seed,
        consumed_samples=state.cursor.consumed_samples,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=run.layout.dp,
    )
    return [sequence for (sequence,) in islice(here, run.micro_batches)]


@pytest.mark.parametrize("name", long_but(CHANGES, "tp2 to cp2 pp2"))
def test_a_resume_on_another_layout_continues_the_same_run(name: str, ranks: RankPool, tmp_path: Path) -> None:
    (before, *first), (after, *second) = CHANGES[name]
    fp32 = ["precision=fp32", "model.num_hidden_layers=2"]
    ranks.run(run_stage, before, str(tmp_path / "a"), *fp32, *first, "train.stop_after=6")
    ranks.run(run_stage, before, str(tmp_path / "b"), *fp32, *first, "train.stop_after=3")
    batch = metrics(tmp_path / "b")[0]["tokens"] // 256  # tokens of one step over the window
    read = ranks.run(samples_read, after, str(tmp_path / "b"), *fp32, *second)
    here = ranks.run(samples_read, 1, str(tmp_path / "b"), *fp32, "topology.dp=1")
    assert {s for r in read for s in r} == set(here[0])
    assert len(here[0]) == batch
    ranks.run(run_stage, after, str(tmp_path / "b"), *fp32, *second)
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["tokens"] == other["tokens"]
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-5, atol=0)


def test_lines_of_steps_that_are_done_again_are_dropped(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_stage, 1, str(tmp_path), "train.stop_after=2")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    ranks.run(run_stage, 1, str(tmp_path), "train.stop_after=4")
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    assert metrics(tmp_path)[2]["loss"] > 1.0


def test_old_checkpoints_go_and_the_pointer_names_the_newest(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_stage, 1, str(tmp_path), "checkpoint.save_steps=1", "train.stop_after=4")
    root = tmp_path / "checkpoints"
    assert [p.name for p in pointer.whole_ones(root)] == ["step_00000003", "step_00000004"]
    assert pointer.newest(root) == pointer.folder_of(root, 4)


def test_a_flipped_byte_or_a_missing_file_of_a_checkpoint_is_found_and_named(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_stage, 1, str(tmp_path), "train.stop_after=1")
    folder = pointer.folder_of(tmp_path / "checkpoints", 1)
    verify_checksums(folder)
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "checksums.json"]
    assert {"common.pt", "config.yaml", "megalong.json", "metadata.json", ".metadata"} <= {p.name for p in files}
    for file in files:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=file.name):
            verify_checksums(folder)
        file.unlink()
        with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
            verify_checksums(folder)
        file.write_bytes(good)
    verify_checksums(folder)
