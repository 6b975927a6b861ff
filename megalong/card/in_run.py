"""What did the runs themselves find out about their model? Rows of a table with a column for every stage, and a map.

Each stage was asked before its first step and after its last, on its own held-out text; what was not asked is a dash.
"""

from __future__ import annotations

from collections.abc import Sequence

from megalong.card.lineage import Stage
from megalong.evaluation.heatmap import draw
from megalong.evaluation.results import Asked, StageEvaluation
from megalong.evaluation.suite import CellResult

NOTHING = "-"


def is_known(stages: Sequence[Stage]) -> bool:
    """Whether any run asked anything."""
    return any(a is not None and (a.cells or a.short_loss is not None) for s in stages for a in _both(s.evaluation))


def rows(stages: Sequence[Stage]) -> list[list[str]]:
    """Title and a cell for every stage: answers found of those asked, then the loss on short texts."""
    found = [["", *(s.name for s in stages)]]
    asked = dict.fromkeys((c.task, c.length) for s in stages for a in _both(s.evaluation) if a for c in a.cells)
    for task, length in asked:
        found.append([f"{task} at {length:,}, before -> after", *(_answers(s, task, length) for s in stages)])
    for title, value in (
        ("Short texts, tokens", lambda e: f"{e.base_window:,}" if e.base_window else NOTHING),
        ("Loss on them, starting weights with their own theta", lambda e: _loss(e.short_loss_start)),
        ("Loss on them, before", lambda e: _loss(e.asked_before and e.asked_before.short_loss)),
        ("Loss on them, after", lambda e: _loss(e.asked_after and e.asked_after.short_loss)),
        ("Harm to short contexts, nats per token", lambda e: _loss(harm(e), "+.4f")),
    ):
        found.append([title, *(value(s.evaluation) if s.evaluation else NOTHING for s in stages)])
    return found


def harm(found: StageEvaluation) -> float | None:
    """What the stage costs at short contexts, nats per token: after it, above the weights that it started from."""
    after = found.asked_after.short_loss if found.asked_after else None
    return None if after is None or found.short_loss_start is None else after - found.short_loss_start


def picture(stage: Stage) -> tuple[str, bytes] | None:
    """A task whose answers lie at depths, needles if they were asked, and its heat maps before and after the stage."""
    shown = [
        asked.named(f"{when} {stage.name}", stage.info.seq_length, stage.info.theta)
        for when, asked in zip(("before", "after"), _both(stage.evaluation), strict=True)
        if asked is not None
    ]
    tasks = dict.fromkeys(c.task for e in shown for c in e.cells if c.depth is not None)
    if not tasks:
        return None
    task = "needle" if "needle" in tasks else next(iter(tasks))
    return task, draw([e for e in shown if any(c.task == task for c in e.cells)], task)


def _both(found: StageEvaluation | None) -> tuple[Asked | None, Asked | None]:
    return (found.asked_before, found.asked_after) if found else (None, None)


def _answers(stage: Stage, task: str, length: int) -> str:
    cells = [[c for c in a.cells if (c.task, c.length) == (task, length)] if a else [] for a in _both(stage.evaluation)]
    return " -> ".join(map(_share, cells)) if any(cells) else NOTHING


def _share(cells: Sequence[CellResult]) -> str:
    return f"{sum(round(c.exact * c.samples) for c in cells)}/{sum(c.samples for c in cells)}" if cells else "missing"


def _loss(value: float | None, form: str = ".4f") -> str:
    return NOTHING if value is None else f"{value:{form}}"
