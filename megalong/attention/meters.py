"""Bytes that the attention collectives move, time that compute waits for them, and time that the kernels work.

Off by default and then free: every collective looks at one module variable. Inside `recording()` (or between
`start()` and `stop()`) each collective adds its payload bytes by kind and each wait adds its exposed time.
Waiting is wall time on the CPU; on CUDA it is the time the compute stream stood still, from a pair of events that
are read only when the meter is asked.

`Stopwatch` times the block kernels themselves. They wait for nobody, and the zigzag gives all ranks the same work: a
rank whose kernels take longer than the others' is a slow device, however much the collectives make all wait alike.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Time that calls took on this rank: wall time on the CPU, time of the compute stream on CUDA."""

    def __init__(self) -> None:
        self._host_seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def time(self, call: Callable[..., T], *args: Any) -> T:
        """Call, and add its time."""
        if torch.cuda.is_available():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            result = call(*args)
            after.record()
            self._events.append((before, after))
            return result
        began = time.perf_counter()
        result = call(*args)
        self._host_seconds += time.perf_counter() - began
        return result

    @property
    def seconds(self) -> float:
        """Sum so far; waits for the device where that is CUDA."""
        if self._events:
            self._events[-1][1].synchronize()
            self._host_seconds += sum(a.elapsed_time(b) for a, b in self._events) / 1e3
            self._events.clear()
        return self._host_seconds

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._host_seconds = self.seconds, 0.0
        return seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block kernels called inside the block."""
        global _stopwatch
        _stopwatch, before = self, _stopwatch
        try:
            yield
        finally:
            _stopwatch = before


_stopwatch: Stopwatch | None = None


@dataclass
class Meter:
    """Counts of one recording, by kind of collective: `ring_kv`, `ring_dkv`, `a2a`, `all_gather`, `reduce_scatter`."""

    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Payload bytes this rank handed to other ranks."""
    received: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Payload bytes this rank got from other ranks."""
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Collectives started."""
    waits: Stopwatch = field(default_factory=Stopwatch)
    """Time that compute stood still for them."""

    @property
    def exposed_seconds(self) -> float:
        """Time that compute stood still for attention collectives (waits for the device where that is CUDA)."""
        return self.waits.seconds

    def summary(self) -> dict[str, float]:
        """Totals for a metrics line: bytes sent and received, collectives, exposed seconds."""
        return {
            "attention_bytes_sent": sum(self.sent.values()),
            "attention_bytes_received": sum(self.received.values()),
            "attention_collectives": sum(self.calls.values()),
            "attention_exposed_seconds": self.exposed_seconds,
        }


_meter: Meter | None = None


def start() -> Meter:
    """Begin counting into a fresh meter."""
    global _meter
    _meter = Meter()
    return _meter


def stop() -> None:
    """End counting."""
    global _meter
    _meter = None


@contextmanager
def recording() -> Iterator[Meter]:
    """Count inside the `with` block."""
    try:
        yield start()
    finally:
        stop()


def count(kind: str, sent: int, received: int) -> None:
    """Note one collective (bytes)."""
    if _meter is not None:
        _meter.sent[kind] += sent
        _meter.received[kind] += received
        _meter.calls[kind] += 1


def kernel_call(call: Callable[..., T], *args: Any) -> T:
    """Call a block kernel, timed if a stopwatch runs."""
    return call(*args) if _stopwatch is None else _stopwatch.time(call, *args)


@contextmanager
def waits_on(watch: Stopwatch) -> Iterator[None]:
    """Inside the block, time how long compute stands still for attention's collectives, whether bytes are counted or
    not."""
    global _waits
    _waits, before = watch, _waits
    try:
        yield
    finally:
        _waits = before


_waits: Stopwatch | None = None


def timed(wait: Callable[[], object]) -> None:
    """Call `wait`, noting how long compute stands still in it."""
    for watch in (_waits, _meter.waits if _meter is not None else None):
        if watch is not None:
            wait = partial(watch.time, wait)
    wait()
