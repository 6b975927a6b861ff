"""What did tools/evaluate.py find out about a model? Its evaluation.json, read strictly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.evaluation.scores import Evaluation
from megalong.runtime.errors import DataError
from megalong.runtime.json_file import read_as, read_json

FILE = Path("evaluation") / "evaluation.json"
"""Where a run's card looks for it, below run_dir: `tools/evaluate.py RUN_DIR --out RUN_DIR/evaluation`."""


@dataclass(frozen=True)
class Scores:
    """Checkpoints that were asked the same, the card's own among them."""

    checkpoints: list[Evaluation]
    base: Evaluation | None


def read_scores(run_dir: Path, given: Path | None, window: int, theta: float, missing: list[str]) -> Scores | None:
    """The scores of a run, if there are any.

    Args:
        given: the file; None: looked for below run_dir, and what is wrong with it goes to `missing`.
        window, theta: the model's, which one of the checkpoints must have.

    Raises:
        DataError: the file that was given is none, or is about other models.
    """
    path = given or run_dir / FILE
    if given is None and not path.is_file():
        return None
    try:
        return _read(path, window, theta)
    except DataError as error:
        if given is not None:
            raise
        missing.append(f"Scores: {error}")
        return None


def _read(path: Path, window: int, theta: float) -> Scores:
    advice = "Run tools/evaluate.py again."
    raw: dict[str, Any] = read_json(path, DataError, advice, allow_nan=True)
    listed, base = raw.get("checkpoints"), raw.get("base")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path} holds no scores of checkpoints. {advice}")

    def one(entry: Any) -> Evaluation:
        return read_as(Evaluation, entry, str(path), DataError, advice, exact=False)

    found = [one(entry) for entry in listed]
    if not any((e.window, e.theta) == (window, theta) for e in found):
        met = ", ".join(f"{e.name} ({e.window:,} tokens, theta {e.theta:,.0f})" for e in found)
        raise DataError(f"{path} is about {met}, not about a model of {window:,} tokens and theta {theta:,.0f}.")
    return Scores(found, one(base) if base is not None else None)
