"""What do all ranks know together after a step? One small gather: stop, save now, written, and who is slow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalong.runtime import device

SLOW = 1.25  # times the median


@dataclass(frozen=True)
class Agreement:
    """The same on every rank."""

    stop: bool
    """A rank has been asked to stop."""
    save: bool
    """A rank (the first: it alone has the clock) wants a checkpoint."""
    written: bool
    """No rank is still writing a checkpoint."""
    kernel_seconds: tuple[float, ...]
    """Time of every rank's attention kernels in the step."""

    @property
    def slowest_over_median(self) -> float:
        """How much longer the slowest rank's kernels took than the median's; 1 where nothing was measured."""
        median = statistics.median(self.kernel_seconds)
        return max(self.kernel_seconds) / median if median > 0 else 1.0

    @property
    def slowest(self) -> int:
        """The rank whose kernels took longest."""
        return self.kernel_seconds.index(max(self.kernel_seconds))


def agree(*, stop: bool, save: bool, written: bool, kernel_seconds: float) -> Agreement:
    """Tell all ranks and hear from all; every rank calls this once a step."""
    mine = torch.tensor([stop, save, not written, kernel_seconds], dtype=torch.float64, device=device.device())
    everyone = mine.new_empty(dist.get_world_size() * 4)
    dist.all_gather_into_tensor(everyone, mine)
    rows = everyone.view(-1, 4).tolist()
    return Agreement(
        stop=any(row[0] for row in rows),
        save=any(row[1] for row in rows),
        written=not any(row[2] for row in rows),
        kernel_seconds=tuple(row[3] for row in rows),
    )


class Stragglers:
    """Says when the same rank has been slow for several steps in a row.

    Args:
        hosts: of every rank.
        steps: steps in a row.
    """

    def __init__(self, hosts: list[str], steps: int = 3) -> None:
        self.hosts, self.steps = hosts, steps
        self._rank, self._count = -1, 0

    def look(self, found: Agreement) -> str | None:
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
