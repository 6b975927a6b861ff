"""Stopping and resuming changes nothing: six steps are three and three, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalong.checkpoint import pointer
from megalong.checkpoint.store import verify_checksums
from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_of
from megalong.runtime.errors import CheckpointError
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.training.loop import StageRun
from megalong.training.start import plan_data, plan_start

TIMED = ("seconds", "tokens_per_second_per_gpu", "mfu", "hfu", "peak_memory_bytes")


def run_stage(run_dir: str, *overrides: str) -> dict[str, torch.Tensor]:
    """One run through the trainer; returns this rank's parameters and optimizer state."""
    base = ["+stage=65k", "+scale=mini", f"run_dir={run_dir}", "train.steps=6", "data.eval_sequences=2"]
    config = compose([*base, "model.num_hidden_layers=2", *overrides], dist.get_world_size())
    start = plan_start(config)
    data = plan_data(config, [])
    initialize(layout_of(config))
    stage = StageRun(config, start, *data)
    stage.run()
    state = {f"model.{n}": p.detach().clone() for n, p in stage.model[0].named_parameters()}
    for i, group in enumerate(stage.optimizer.optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            moments = stage.optimizer.optimizer.state[parameter]
            state |= {f"optimizer.{i}.{j}.{k}": v.clone() for k, v in moments.items() if isinstance(v, torch.Tensor)}
            state[f"optimizer.{i}.{j}.master"] = parameter.detach().clone()
    return state


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def test_six_steps_are_three_a_stop_and_three_bit_for_bit(ranks: RankPool, tmp_path: Path) -> None:
    layout = ["topology.tp=2", "topology.cp=2"]
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


def test_a_resume_on_another_layout_continues_the_same_run(ranks: RankPool, tmp_path: Path) -> None:
    fp32 = ["precision=fp32"]
    ranks.run(run_stage, 1, str(tmp_path / "a"), *fp32)
    ranks.run(run_stage, 2, str(tmp_path / "b"), *fp32, "topology.tp=2", "train.stop_after=3")
    ranks.run(run_stage, 4, str(tmp_path / "b"), *fp32, "topology.cp=2", "topology.pp=2")
    for one, other in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert one["tokens"] == other["tokens"]
        torch.testing.assert_close(one["loss"], other["loss"], rtol=2e-5, atol=0)


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
