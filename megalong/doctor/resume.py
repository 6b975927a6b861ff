"""Is a run that stops, saves and resumes here the run that never stopped?

The real trainer, twice: four steps at once, and two, a stop, and two. On the CPU every metric is equal to the last bit.
On GPUs sums are made in no fixed order, so losses must agree within what that leaves.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megalong.doctor.part import Round
from megalong.doctor.ranks import run_on_ranks
from megalong.doctor.result import Check, held

STEPS, STOP = 4, 2
TOLERANCE = 1e-3
"""Relative, of a loss on GPUs."""
COMPARED = ("loss", "grad_norm", "lr", "step")
SMALL = ["model.num_hidden_layers=2", "stage.seq_length=16384", f"train.steps={STEPS}", "data.eval_sequences=0"]


def train(settings: list[str]) -> None:
    """One run of the trainer from wherever its run_dir is, as a task for all ranks."""
    from megalong.planning.plan import plan_of
    from megalong.topology.groups import initialize
    from megalong.training.loop import StageRun
    from megalong.training.sequences import open_data
    from megalong.training.start import plan_start

    run = run_on_ranks(settings)
    start = plan_start(run)
    run, data = open_data(run, [])
    initialize(run.layout)
    StageRun(run, plan_of(run), start, data).run()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What was compared, step by step."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key in COMPARED} for line in lines]


def run(visit: Round) -> list[Check]:
    """Unbroken against stopped and resumed."""
    world = visit.ranks.count
    layout = ["topology.cp=2", f"topology.dp={world // 2}"] if world % 2 == 0 else [f"topology.dp={world}"]
    settings = [*visit.mini, *SMALL, *layout, "topology.tp=1", "topology.pp=1", f"train.global_batch_size={world}"]
    with tempfile.TemporaryDirectory(prefix="megalong-doctor-", dir=visit.out) as folder:
        whole, parts = Path(folder) / "whole", Path(folder) / "parts"
        visit.ranks.run(train, world, [*settings, f"run_dir={whole}"])
        visit.ranks.run(train, world, [*settings, f"run_dir={parts}", f"train.stop_after={STOP}"])
        stopped = len(metrics(parts))
        visit.ranks.run(train, world, [*settings, f"run_dir={parts}"])
        one, two = metrics(whole), metrics(parts)
    return [judged(f"resumed on {world} ranks", one, two, stopped, exact=not visit.on_gpu)]


def judged(name: str, whole: list[dict[str, Any]], parts: list[dict[str, Any]], stopped: int, exact: bool) -> Check:
    """Metrics of the unbroken run against those of the one that stopped after `stopped` steps."""
    complete = len(whole) == len(parts) == STEPS and stopped == STOP
    told = f"stopped after {stopped} steps, {len(parts)} of {STEPS} in all"
    if not complete:
        return held(name, False, told, f"{STOP} steps, then {STEPS}")
    off = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(whole, parts, strict=True))
    told += f"; last loss {whole[-1]['loss']:.7f} and {parts[-1]['loss']:.7f}"
    limit = "bit for bit: loss, gradient norm, learning rate" if exact else f"losses within {TOLERANCE:.0e}"
    return held(name, whole == parts if exact else off <= TOLERANCE, told, limit)
