"""Which block of a tensor does a record on disk hold, and where is the record? Offsets, sizes, a place in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A rectangular part of a whole tensor: first element and number of elements along every axis."""

    low: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.size)

    def common(self, other: Block) -> Block | None:
        """What two blocks share; None: nothing."""
        low = tuple(max(a, b) for a, b in zip(self.low, other.low, strict=True))
        size = tuple(
            min(a + m, b + n) - c for a, m, b, n, c in zip(self.low, self.size, other.low, other.size, low, strict=True)
        )
        return Block(low, size) if all(n > 0 for n in size) else None


@dataclass(frozen=True)
class StoredBlock:
    """One record on disk and the block of a tensor that it holds; a leading layer axis counts as an axis."""

    key: str
    block: Block
    file: str
    start: int
    """First byte of the record in its file."""
    length: int
    """Bytes of the record, its own frame included."""
