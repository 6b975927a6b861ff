"""Ranks as (tp, cp, pp, dp) coordinates, and the ranks that form each group.

The order is megatron-core's default `tp-cp-ep-dp-pp` (`megatron/core/parallel_state.py`): tensor parallel
varies fastest, then context, then data, and pipeline slowest. Pure integers: nothing here needs a process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalong.runtime.errors import LayoutError

Axis = Literal["tp", "cp", "dp", "pp"]
ORDER: tuple[Axis, ...] = ("tp", "cp", "dp", "pp")  # fastest-varying first


@dataclass(frozen=True)
class Coordinates:
    """Where one rank stands on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the four parallel axes; their product is the number of ranks.

    Raises:
        LayoutError: a size is not a positive integer.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis in ORDER:
            size = getattr(self, axis)
            if not isinstance(size, int) or size < 1:
                raise LayoutError(f"topology.{axis}={size!r}: a parallel size is an integer of at least 1.")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.pp * self.dp

    def stride(self, axis: Axis) -> int:
        """Distance in global rank between neighbours along `axis`."""
        stride = 1
        for other in ORDER:
            if other == axis:
                return stride
            stride *= getattr(self, other)
        raise AssertionError(axis)

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a global rank in [0, world_size)."""
        assert 0 <= rank < self.world_size, (rank, self)
        return Coordinates(**{a: rank // self.stride(a) % getattr(self, a) for a in ORDER})

    def rank(self, at: Coordinates) -> int:
        """Global rank at the given coordinates."""
        return sum(getattr(at, a) * self.stride(a) for a in ORDER)

    def group(self, rank: int, *axes: Axis) -> list[int]:
        """Global ranks that differ from `rank` only along `axes`, in ascending order."""
        here = self.coordinates(rank)
        return [r for r in range(self.world_size) if self._same_outside(here, self.coordinates(r), axes)]

    def groups(self, *axes: Axis) -> list[list[int]]:
        """All groups along `axes`: a partition of the ranks, each group ascending, ordered by first rank."""
        found: dict[tuple[int, ...], list[int]] = {}
        fixed = [a for a in ORDER if a not in axes]
        for r in range(self.world_size):
            at = self.coordinates(r)
            found.setdefault(tuple(getattr(at, a) for a in fixed), []).append(r)
        return list(found.values())

    def rings(self) -> list[list[int]]:
        """The context-parallel groups in ring order: position i sends keys and values to position i + 1."""
        return self.groups("cp")

    @staticmethod
    def _same_outside(a: Coordinates, b: Coordinates, axes: tuple[Axis, ...]) -> bool:
        return all(getattr(a, x) == getattr(b, x) for x in ORDER if x not in axes)

    def __str__(self) -> str:
        return f"tp={self.tp} cp={self.cp} pp={self.pp} dp={self.dp}"


def factorisations(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ordered tuples of `parts` positive integers whose product is n."""
    if parts == 1:
        yield (n,)
        return
    for first in range(1, n + 1):
        if n % first == 0:
            for rest in factorisations(n // first, parts - 1):
                yield (first, *rest)
