"""What all ranks know together after a step, by one small gather: stop, save now, written, and who is slow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalong.runtime import device


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
