"""What a run records of its speed is what the plan would say of a step that takes as long."""

import json
from pathlib import Path

import pytest

from megalong.model.flops import model_flops_per_step
from megalong.model.shape import output_layer
from megalong.planning.plan import plan_of
from megalong.recipe.resolve import run_of
from megalong.run import Run
from megalong.training.metrics import METRICS, Metrics
from megalong.training.step import StepResult
from megalong.training.steps import Done

SECONDS = 2.0


def settings(folder: Path, *overrides: str) -> Run:
    return run_of(["+stage=65k", "+scale=mini", "topology.cp=1", "topology.dp=1", f"run_dir={folder}", *overrides], 1)


def recorded(run: Run, seconds: float) -> dict[str, float]:
    metrics = Metrics(run, 0, first=True)
    metrics.step(Done(1, StepResult(1.0, 1, 1.0, 1e-5, True), str, seconds, {}, {}, 256), tokens=1, skipped=0)
    metrics.close()
    return json.loads((run.run_dir / METRICS).read_text())


@pytest.mark.parametrize("overrides", [(), ("precision=fp32",), ("train.loss_chunk=0", "train.recompute=none")])
def test_a_step_as_long_as_planned_has_the_planned_utilisation(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = settings(tmp_path, *overrides)
    plan = plan_of(run)
    found = recorded(run, plan.step_s)
    for name in ("tokens_per_second_per_gpu", "mfu", "hfu"):
        assert found[name] == getattr(plan.use, name)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_mfu_is_a_share_of_the_bf16_peak_in_either_precision(tmp_path: Path, precision: str) -> None:
    run = settings(tmp_path, f"precision={precision}")
    flops = model_flops_per_step(run.model, run.seq_length, run.global_batch_size) / SECONDS
    mfu = recorded(run, SECONDS)["mfu"]
    assert mfu == pytest.approx(flops / (run.config.cluster.peak_bf16_tflops.value * 1e12))


def test_logits_that_are_computed_once_are_counted_once(tmp_path: Path) -> None:
    hfu = {}
    for chunk in (0, 64):
        run = settings(tmp_path / str(chunk), f"train.loss_chunk={chunk}", "train.recompute=full")
        run.run_dir.mkdir()
        hfu[chunk] = recorded(run, SECONDS)["hfu"]
    tokens = run.seq_length * run.global_batch_size
    again = 2 * output_layer(run.model).numel * tokens / SECONDS / (run.config.cluster.peak_tflops * 1e12)
    assert hfu[64] - hfu[0] == pytest.approx(again)
