"""A loss that jumps above the median of the steps before it is said, with the samples of the step."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

from megalong.runtime.console import warn
from megalong.training.agreement import Agreement
from megalong.training.steps import Done

WINDOW = 16  # steps
FEWEST = 4  # steps before anything is called a jump
NATS = 0.5  # smallest jump worth a line
SPREADS = 6.0  # times the median distance from the median


class LossWatch:
    """Remembers recent losses (a `Watcher`)."""

    prefix = "loss_spikes"

    def __init__(self) -> None:
        # by the length of the sequences: short ones are harder, which is no jump
        self._losses: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))

    def look(self, done: Done, word: Agreement) -> dict[str, float]:
        """Warn of a spike."""
        above = self.jump(done.result.loss, done.window) if done.result.updated else None
        if above is not None:
            what = f"step {done.step}, loss {done.result.loss:.4f}, {above:.2f} nats above the steps before"
            warn(f"loss spike: {what}. {done.samples()}")
        return {}

    def jump(self, loss: float, window: int = 0) -> float | None:
        """Nats above the median of recent steps of a window if that is a spike, else None; spikes do not move it."""
        losses = self._losses[window]
        if len(losses) >= FEWEST:
            median = statistics.median(losses)
            spread = statistics.median(abs(x - median) for x in losses)
            above = loss - median
            if above > max(NATS, SPREADS * spread):
                return above
        losses.append(loss)
        return None
