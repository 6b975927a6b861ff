"""Did the loss jump? Compared with the median of the steps before it."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW = 16  # steps
FEWEST = 4  # steps before anything is called a jump
NATS = 0.5  # smallest jump worth a line
SPREADS = 6.0  # times the median distance from the median


class LossWatch:
    """Remembers recent losses."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def jump(self, loss: float) -> float | None:
        """Nats above the median of recent steps if that is a spike, else None; spikes do not move the median."""
        if len(self._losses) >= FEWEST:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(x - median) for x in self._losses)
            above = loss - median
            if above > max(NATS, SPREADS * spread):
                return above
        self._losses.append(loss)
        return None
