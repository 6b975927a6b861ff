"""`evaluation.json` holds what a stage did to its window: loss along it, answers found in it, loss on short texts.

Before the stage, after it, and at the steps under way at which the run was evaluated; written and read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalong.evaluation.position import LossByPosition
from megalong.evaluation.scores import Evaluation
from megalong.evaluation.suite import CellResult
from megalong.runtime.errors import DataError
from megalong.runtime.files import write_text
from megalong.runtime.json_file import read_as, read_json

FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class WindowEvaluation:
    """Held-out loss by position at the start and at the end of a stage, on sequences of one length."""

    seq_length: int
    before: LossByPosition
    after: LossByPosition | None
    """None while the stage is under way."""


@dataclass(frozen=True)
class Asked:
    """What one evaluation found besides the loss by position."""

    cells: list[CellResult]
    """Of the questions, by task, length and depth; []: none were asked."""
    short_loss: float | None
    """Nats per token of held-out text cut to the base window; None: there is none."""

    def named(self, name: str, window: int, theta: float) -> Evaluation:
        """As `tools/evaluate.py` writes it of a checkpoint, for tables and heat maps."""
        return Evaluation(name, window, theta, self.cells, None, None, None, self.short_loss)


@dataclass(frozen=True)
class Moment:
    """One evaluation."""

    step: int
    """Steps done then."""
    position: LossByPosition
    """On the stage's window."""
    shorter: list[LossByPosition]
    """On the shorter windows, in the order of `StageEvaluation.shorter`."""
    asked: Asked


@dataclass(frozen=True)
class StageEvaluation(WindowEvaluation):
    """That of the stage's window, and of shorter ones that its steps read besides."""

    shorter: list[WindowEvaluation] = field(default_factory=list)
    asked_before: Asked | None = None
    """None in what was written before there were questions in the run; so for the fields below."""
    asked_after: Asked | None = None
    under_way: list[Moment] = field(default_factory=list)
    """Evaluations of `evaluation.every_steps`, by step."""
    base_window: int = 0
    """Tokens that the short texts are cut to: the window of the base model."""
    short_loss_start: float | None = None
    """Of the weights that the stage starts from, under their own theta; in the first stage that is the base model."""

    def write(self, run_dir: Path) -> None:
        """Write `evaluation.json` into `run_dir`, replacing an earlier one at once."""
        write_text(run_dir / FILE_NAME, json.dumps(asdict(self), indent=1) + "\n")


_LATER: dict[str, Any] = {
    "shorter": [],
    "asked_before": None,
    "asked_after": None,
    "under_way": [],
    "base_window": 0,
    "short_loss_start": None,
}
"""Fields that did not exist once, and what they held then."""


def evaluation_from(raw: Any, where: str = "the evaluation in a checkpoint") -> StageEvaluation:
    """Inverse of `dataclasses.asdict`.

    Raises:
        DataError: not one of ours.
    """
    raw = _with_curves({**_LATER, **raw}) if isinstance(raw, dict) else raw
    found = read_as(StageEvaluation, raw, where, DataError, "Evaluate again.")
    curves = [curve for window in (found, *found.shorter) for curve in (window.before, window.after)]
    for curve in [*curves, *(c for moment in found.under_way for c in (moment.position, *moment.shorter))]:
        if curve is not None and len(curve.edges) != len(curve.loss) + 1:
            raise DataError(f"{where}: {len(curve.edges)} edges for {len(curve.loss)} losses. Evaluate again.")
    return found


def _with_curves(raw: Any) -> Any:
    """The same with what curves did not hold once: nothing was known of single sequences."""
    if isinstance(raw, list):
        return [_with_curves(value) for value in raw]
    if not isinstance(raw, dict):
        return raw
    later: dict[str, Any] = {"spread": [], "sequences": []} if "edges" in raw else {}
    return later | {key: _with_curves(value) for key, value in raw.items()}


def read_evaluation(run_dir: Path) -> StageEvaluation:
    """Read what `StageEvaluation.write` wrote.

    Raises:
        DataError: no evaluation there, or not one of ours.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise DataError(f"{run_dir} has no {FILE_NAME}: the stage was not evaluated (data.eval_sequences=0?).")
    return evaluation_from(read_json(path, DataError, "Evaluate again.", allow_nan=True), str(path))
