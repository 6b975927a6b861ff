"""What is taken at a time is a document, or those that are joined into one; here are the pieces it becomes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megalong.data.pipeline.pieces import CONSTANT, PIECE

Place = tuple[int, int]
"""First token in the table of constants, and tokens."""


@dataclass(frozen=True)
class Units:
    """Documents of a bin, those joined that belong together."""

    records: np.ndarray
    """See `index.RECORD`."""
    first: np.ndarray
    """[units] int64: the first record of each."""
    count: np.ndarray
    """[units] int64: its records."""
    lengths: np.ndarray
    """[units] int64: its tokens, without what stands around it."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def sources(self) -> np.ndarray:
        """[units] int32."""
        return self.records["source"][self.first]

    @property
    def places(self) -> np.ndarray:
        """[units] uint64."""
        return self.records["place"][self.first]


def units_of(records: np.ndarray, join: int) -> Units:
    """Group records (ascending by place) into documents.

    Args:
        join: tokens between those that are joined.
    """
    if not len(records):
        empty = np.empty(0, np.int64)
        return Units(records, empty, empty, empty)
    joined = records["place"] != records["hash"]
    new = np.r_[True, (records["place"][1:] != records["place"][:-1]) | ~joined[1:]]
    first = np.flatnonzero(new)
    count = np.diff(np.r_[first, len(records)])
    lengths = np.add.reduceat(records["length"].astype(np.int64), first) + (count - 1) * join
    return Units(records, first, count, lengths)


def mixed(places: np.ndarray, seed: int) -> np.ndarray:
    """[n] uint64 keys that follow from place and seed (splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = places + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class Taken:
    """Documents that were taken together."""

    pieces: np.ndarray
    """[pieces] PIECE."""
    owner: np.ndarray
    """[pieces] int64: which of the documents each belongs to."""
    lengths: np.ndarray
    """[documents] int64: tokens."""
    keys: np.ndarray
    """[4, documents] uint64: what they are ordered by in the result."""


def pieces_of(
    units: Units,
    mine: np.ndarray,
    limits: np.ndarray,
    glue: tuple[Place, Place, Place],
    shuffle: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of some documents, each document cut to its limit.

    Args:
        mine: [n] which documents.
        limits: [n] tokens of each at most, at least 1.
        glue: constants before each, between those joined, after each.
        shuffle: from hashes of texts to keys by which joined ones are ordered; None: as they were read.

    Returns:
        ([pieces] PIECE, [pieces] int64: the document, from 0 to n - 1, that each belongs to).
    """
    count = units.count[mine]
    member = np.repeat(np.arange(len(mine)), count)
    within = np.arange(len(member)) - np.repeat(np.cumsum(count) - count, count)
    records = units.records[np.repeat(units.first[mine], count) + within]
    if shuffle is not None:
        records = records[np.lexsort((records["number"], records["shard"], shuffle(records["hash"]), member))]
    # each document has 2 * count + 1 slots: before, record, join, record, ..., record, after
    slots = 2 * count + 1
    owner = np.repeat(np.arange(len(mine)), slots)
    slot = np.arange(len(owner)) - np.repeat(np.cumsum(slots) - slots, slots)
    pieces = np.zeros(len(owner), PIECE)
    pieces["shard"] = CONSTANT
    pieces["source"] = units.sources[mine][owner]
    is_record = slot % 2 == 1
    for chosen, (start, length) in (
        (slot == 0, glue[0]),
        ((slot % 2 == 0) & (slot > 0) & (slot < 2 * count[owner]), glue[1]),
        (slot == 2 * count[owner], glue[2]),
    ):
        pieces["start"][chosen], pieces["length"][chosen] = start, length
    for name in ("shard", "start", "length"):
        pieces[name][is_record] = records[name]
    ends = np.cumsum(pieces["length"])
    before_unit = np.r_[0, ends[np.cumsum(slots) - 1][:-1]]
    before = ends - pieces["length"] - before_unit[owner]
    pieces["length"] = np.clip(limits[owner] - before, 0, pieces["length"])
    kept = pieces["length"] > 0
    pieces, owner = pieces[kept], owner[kept]
    pieces["opens"] = np.r_[True, owner[1:] != owner[:-1]]
    return pieces, owner
