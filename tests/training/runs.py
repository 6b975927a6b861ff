"""Runs the real trainer on pool ranks and reports all that it holds afterwards."""

import json
from pathlib import Path
from typing import Any

import torch

from megalong.planning.plan import plan_of
from megalong.topology.groups import initialize
from megalong.training.loop import StageRun
from megalong.training.sequences import open_data
from megalong.training.start import plan_start
from tests.run_on_ranks import run_on_ranks

TIMED = ("seconds", "tokens_per_second_per_gpu", "mfu", "hfu", "peak_memory_bytes", "phase_seconds")


def stage_run(run_dir: str, *overrides: str, stage: str = "65k") -> StageRun:
    """A stage at mini scale, loaded and ready to run."""
    base = [f"+stage={stage}", "+scale=mini", f"run_dir={run_dir}", "train.steps=6", "data.eval_sequences=0"]
    run = run_on_ranks([*base, "model.num_hidden_layers=2", *overrides])
    start = plan_start(run)
    run, data = open_data(run, [])
    initialize(run.layout)
    return StageRun(run, plan_of(run), start, data)


def run_stage(run_dir: str, *overrides: str) -> dict[str, torch.Tensor]:
    """One run through the trainer; returns this rank's parameters and optimizer state."""
    stage = stage_run(run_dir, *overrides)
    stage.run()
    return state_of(stage)


def state_of(stage: StageRun) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state of this rank."""
    state = {f"model.{n}": p.detach().clone() for n, p in stage.state.model[0].named_parameters()}
    for i, group in enumerate(stage.state.optimizer.optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            moments = stage.state.optimizer.optimizer.state[parameter]
            state |= {f"optimizer.{i}.{j}.{k}": v.clone() for k, v in moments.items() if isinstance(v, torch.Tensor)}
            state[f"optimizer.{i}.{j}.master"] = parameter.detach().clone()
    return state


def outcome_of(run_dir: str, *overrides: str, stage: str = "65k") -> str:
    """How a run ended: "done", or the error that this rank got."""
    from megalong.runtime.errors import UserError

    try:
        stage_run(run_dir, *overrides, stage=stage).run()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    """Bit for bit."""
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))
