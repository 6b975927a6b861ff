"""Where does the time of a step go? To parts that can be timed from outside, without waiting for the device in between.

`attention` is the block kernels (`attention/meters.py`), `waiting` the time that compute stood still for attention's
collectives, `gradients` what follows the last backward pass (reducing gradients over replicas, and megatron's other
sums), `optimizer` clipping and AdamW, `data` reading the next sequence. `other` is the rest: matrix products,
elementwise operators, and waiting for tensor- and pipeline-parallel neighbours; a profile (`profiles.py`) tells these
apart. On CUDA kernels, waiting, gradients and optimizer are times of the compute stream, from events that are read at
the end of the step; on the CPU wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from megalong.attention import meters
from megalong.attention.meters import Stopwatch

T = TypeVar("T")

ATTENTION, WAITING, GRADIENTS, OPTIMIZER, DATA, OTHER = PHASES = (
    "attention",
    "waiting",
    "gradients",
    "optimizer",
    "data",
    "other",
)


class Phases:
    """Stopwatches of one rank."""

    def __init__(self) -> None:
        self._watches = {name: Stopwatch() for name in (ATTENTION, WAITING, GRADIENTS, OPTIMIZER)}
        self._data_seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside the block."""
        global _now
        _now, before = self, _now
        try:
            with self._watches[ATTENTION].running(), meters.waits_on(self._watches[WAITING]):
                yield
        finally:
            _now = before

    def read(self, seconds: float) -> dict[str, float]:
        """Seconds by phase since the last reading.

        Args:
            seconds: the whole step.
        """
        found = {name: watch.read() for name, watch in self._watches.items()}
        found[DATA], self._data_seconds = self._data_seconds, 0.0
        return {**found, OTHER: max(0.0, seconds - sum(found.values()))}

    def timed(self, name: str, call: Callable[[], T]) -> T:
        """Call, and add its time to a phase."""
        if name != DATA:
            return self._watches[name].time(call)
        began = time.perf_counter()
        result = call()
        self._data_seconds += time.perf_counter() - began
        return result


_now: Phases | None = None


def timed(name: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call, and count its time as that of a phase, if phases are timed."""
    return call(*args, **kwargs) if _now is None else _now.timed(name, partial(call, *args, **kwargs))


def shares(seconds: dict[str, float]) -> str:
    """Shares of a step for the console: the largest first, what is below one percent left out."""
    whole = sum(seconds.values()) or 1.0
    found = sorted(((s / whole, name) for name, s in seconds.items()), reverse=True)
    return " ".join(f"{name} {share:.0%}" for share, name in found if share >= 0.01)
