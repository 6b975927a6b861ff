"""`evaluation.json` holds what a stage did to the loss along its window: before and after, written and read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalong.evaluation.position import LossByPosition
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
class StageEvaluation(WindowEvaluation):
    """That of the stage's window, and of shorter ones that its steps read besides."""

    shorter: list[WindowEvaluation] = field(default_factory=list)

    def write(self, run_dir: Path) -> None:
        """Write `evaluation.json` into `run_dir`, replacing an earlier one at once."""
        write_text(run_dir / FILE_NAME, json.dumps(asdict(self), indent=1) + "\n")


def evaluation_from(raw: Any, where: str = "the evaluation in a checkpoint") -> StageEvaluation:
    """Inverse of `dataclasses.asdict`.

    Raises:
        DataError: not one of ours.
    """
    raw = {"shorter": [], **raw} if isinstance(raw, dict) else raw  # there was none once
    found = read_as(StageEvaluation, raw, where, DataError, "Evaluate again.")
    for curve in (c for window in (found, *found.shorter) for c in (window.before, window.after)):
        if curve is not None and len(curve.edges) != len(curve.loss) + 1:
            raise DataError(f"{where}: {len(curve.edges)} edges for {len(curve.loss)} losses. Evaluate again.")
    return found


def read_evaluation(run_dir: Path) -> StageEvaluation:
    """Read what `StageEvaluation.write` wrote.

    Raises:
        DataError: no evaluation there, or not one of ours.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise DataError(f"{run_dir} has no {FILE_NAME}: the stage was not evaluated (data.eval_sequences=0?).")
    return evaluation_from(read_json(path, DataError, "Evaluate again.", allow_nan=True), str(path))
