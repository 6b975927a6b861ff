"""The documents of all shards that count, and their sums: copies found, lengths added up, in bounded memory.

Places (see `tokenized`) are cut into bins. A bin is gathered from all shards, worked on, and forgotten; what stays is
one byte per document. Order among equals is that of the shards, so the first copy is the one that is kept.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from megalong.data.pipeline.tokenized import Tokenized, histogram

BIN_DOCUMENTS = 2**21
"""Documents of a bin on average at most (0.2 GB)."""
MAX_BINS = 4096
KEPT, COPY, SHORT = 0, 1, 2
RECORD = np.dtype(
    [(name, "<u8") for name in ("place", "hash", "start", "length", "number")]
    + [(name, "<i4") for name in ("source", "shard", "column")]
)
"""A document among all: as in its shard's index, with the number of its source among all, its shard, its column."""


@dataclass(frozen=True)
class Totals:
    """What the documents that count add up to."""

    documents: dict[str, int]
    """Source -> documents."""
    histograms: dict[str, list[int]]
    """Source -> documents by length, as in `tokenized.histogram`."""
    dropped: dict[str, int]


class Index:
    """All documents of a source.

    Args:
        shards: in the order of the source.
        eval_fraction: documents whose hash lies in this first part are held out.
        min_tokens: shorter ones do not count.
        dedup: of equal texts only the first counts.
    """

    def __init__(self, shards: list[Tokenized], *, eval_fraction: float, min_tokens: int, dedup: bool) -> None:
        self.shards = shards
        self.sources = sorted({name for shard in shards for name in shard.report.sources})
        self._numbers = [np.array([self.sources.index(n) for n in s.report.sources] or [0], np.int32) for s in shards]
        self._first = np.cumsum([0, *(s.report.documents for s in shards)])
        documents = int(self._first[-1])
        self._state = np.zeros(documents, np.uint8)
        self._eval_below = np.uint64(math.ceil(eval_fraction * 2**64))
        self.bins = min(MAX_BINS, 1 << max(4, (documents // BIN_DOCUMENTS).bit_length()))
        joined = any(_is_joined(shard) for shard in shards)
        self._count(dedup, min_tokens, 1 if joined else self.bins)

    def documents(self, bin_: int, bins: int | None = None) -> np.ndarray:
        """Records of the documents that count, of one of `bins` ranges of places; ascending by place, shard, number."""
        found = self._gather(bin_, bins or self.bins)
        return found[self._state[self._slots(found)] == KEPT]

    def held_out(self, records: np.ndarray) -> np.ndarray:
        """Which documents are held out, [n] bool: as `builder.held_out` says of their texts."""
        return records["hash"] < self._eval_below

    def _slots(self, records: np.ndarray) -> np.ndarray:
        return self._first[records["shard"]] + records["column"]

    def _gather(self, bin_: int, bins: int) -> np.ndarray:
        low, high = bin_ * (2**64 // bins), (bin_ + 1) * (2**64 // bins) - 1
        parts = []
        for number, shard in enumerate(self.shards):
            index = shard.index()
            first = int(np.searchsorted(index[0], np.uint64(low), "left"))
            last = int(np.searchsorted(index[0], np.uint64(high), "right"))
            if first == last:
                continue
            part = np.empty(last - first, RECORD)
            for row, name in enumerate(("place", "hash", "start", "length", "number")):
                part[name] = index[row, first:last]
            part["source"] = self._numbers[number][index[5, first:last].astype(np.int64)]
            part["shard"], part["column"] = number, np.arange(first, last)
            parts.append(part)
        found = np.concatenate(parts) if parts else np.empty(0, RECORD)
        return found[np.lexsort((found["number"], found["shard"], found["place"]))]

    def _count(self, dedup: bool, min_tokens: int, bins: int) -> None:
        documents: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        sums: dict[str, np.ndarray] = {name: np.zeros(65, np.int64) for name in self.sources}
        for bin_ in range(bins):
            found = self._gather(bin_, bins)
            state = np.zeros(len(found), np.uint8)
            if dedup:
                order = np.lexsort((found["number"], found["shard"], found["length"], found["hash"]))
                same = (found["hash"][order][1:] == found["hash"][order][:-1]) & (
                    found["length"][order][1:] == found["length"][order][:-1]
                )
                state[order[1:][same]] = COPY
            state[(state == KEPT) & (found["length"] < min_tokens)] = SHORT
            dropped["copies"] += int((state == COPY).sum())
            dropped["short"] += int((state == SHORT).sum())
            self._state[self._slots(found)] = state
            for number, name in enumerate(self.sources):
                lengths = found["length"][(found["source"] == number) & (state == KEPT)]
                documents[name] += len(lengths)
                counts = histogram(lengths)
                sums[name][: len(counts)] += np.array(counts, np.int64)
        self.totals = Totals(
            documents={name: documents[name] for name in self.sources},
            histograms={name: np.trim_zeros(sums[name], "b").tolist() for name in self.sources},
            dropped={why: dropped[why] for why in ("copies", "short")},
        )


def _is_joined(shard: Tokenized) -> bool:
    index = shard.index()
    return bool((index[0] != index[1]).any())
