"""A rank whose attention kernels are slow, step after step, is named with its host: every other rank waits for it."""

from __future__ import annotations

from megalong.runtime.console import warn
from megalong.training.agreement import Agreement
from megalong.training.steps import Done

SLOW = 1.25  # times the median


class Stragglers:
    """Says when the same rank has been slow for several steps in a row (a `Watcher`).

    Args:
        hosts: of every rank.
        steps: steps in a row.
        even: whether all ranks have the same work; else nothing is said.
        window: tokens of the sequences of steps that are looked at; None: all. Shorter ones, packed, need not be even.
    """

    prefix = "attention_kernels"

    def __init__(self, hosts: list[str], steps: int = 3, even: bool = True, window: int | None = None) -> None:
        self.hosts, self.steps, self.even, self.window = hosts, steps, even, window
        self._rank, self._count = -1, 0

    def look(self, done: Done, word: Agreement) -> dict[str, float]:
        """Warn of a slow rank."""
        if not self.even or self.window not in (None, done.window):
            return {}
        sentence = self.slow(word)
        if sentence is not None:
            warn(sentence)
        return {"slowest_rank": float(word.slowest), "slowest_over_median": word.slowest_over_median}

    def slow(self, found: Agreement) -> str | None:
        """A sentence the moment a rank has been slow for long enough."""
        rank = found.slowest if found.slowest_over_median > SLOW else -1
        self._count = self._count + 1 if rank == self._rank else 1
        self._rank = rank
        if rank < 0 or self._count != self.steps:
            return None
        return (
            f"rank {rank} on host {self.hosts[rank]} is slow: its attention kernels took "
            f"{found.slowest_over_median:.2f} times the median of all ranks in {self.steps} steps running, and every "
            "rank waits for it. Check its clocks, temperature and neighbours, or leave the node out."
        )
