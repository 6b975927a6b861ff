"""What did a checkpoint score? One record, as tools/evaluate.py writes it and a model card reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalong.evaluation.documents import LongLoss
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.suite import CellResult


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint scored."""

    name: str
    window: int
    theta: float
    cells: list[CellResult]
    position: LossByPosition | None
    perplexity: float | None
    long: LongLoss | None
    short_loss: float | None
    """Nats per token on the short documents."""

    @property
    def accuracy(self) -> dict[str, float]:
        """Mean accuracy by task."""
        tasks = dict.fromkeys(c.task for c in self.cells)
        return {t: _mean([c.accuracy for c in self.cells if c.task == t]) for t in tasks}

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"accuracy": self.accuracy}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
