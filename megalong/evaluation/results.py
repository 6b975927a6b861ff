"""What did a stage do to the loss along its window? `evaluation.json`: before and after, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalong.evaluation.position import LossByPosition
from megalong.runtime.errors import DataError
from megalong.runtime.files import write_text

FILE_NAME = "evaluation.json"


@dataclass(frozen=True)
class StageEvaluation:
    """Held-out loss by position at the start and at the end of a stage."""

    seq_length: int
    before: LossByPosition
    after: LossByPosition | None
    """None while the stage is under way."""

    def write(self, run_dir: Path) -> None:
        """Write `evaluation.json` into `run_dir`, replacing an earlier one at once."""
        write_text(run_dir / FILE_NAME, json.dumps(asdict(self), indent=1) + "\n")


def evaluation_from(raw: Mapping[str, Any]) -> StageEvaluation:
    """Inverse of `dataclasses.asdict`."""
    after = raw["after"]
    return StageEvaluation(
        seq_length=raw["seq_length"],
        before=LossByPosition(**raw["before"]),
        after=LossByPosition(**after) if after is not None else None,
    )


def read_evaluation(run_dir: Path) -> StageEvaluation:
    """Read what `StageEvaluation.write` wrote.

    Raises:
        DataError: no evaluation there, or not one of ours.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise DataError(f"{run_dir} has no {FILE_NAME}: the stage was not evaluated (data.eval_sequences=0?).")
    try:
        return evaluation_from(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
