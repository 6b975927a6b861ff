"""Before it is written a stream of tokens is pieces: stretches of tokenized shards and of a few constants.

Of every document a piece knows where its tokens lie; separators and texts made for recall lie in a table of constants.
A plan of 800 million tokens is a few millions of pieces, and any row of it can be written without the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

CONSTANT = -1
PIECE = np.dtype([("shard", "<i4"), ("source", "<i4"), ("start", "<i8"), ("length", "<i8"), ("opens", "?")])
"""Shard (or CONSTANT), number of the source, first token there, tokens, and whether a document begins here."""


@dataclass
class Constants:
    """Token ids that stand in no shard."""

    ids: list[int] = field(default_factory=list)
    _places: dict[tuple[int, ...], int] = field(default_factory=dict)

    def place(self, ids: Iterable[int]) -> tuple[int, int]:
        """Where in the table a text is (it is put there), and its length."""
        key = tuple(ids)
        if key not in self._places:
            self._places[key] = len(self.ids)
            self.ids += key
        return self._places[key], len(key)


@dataclass(frozen=True)
class Stream:
    """Pieces laid end to end, to be cut into rows of one window.

    Row r has the tokens [r * seq_length, (r + 1) * seq_length], both ends included: the last is only ever a label, and
    the first of the next row.
    """

    pieces: np.ndarray
    """[pieces] PIECE."""
    seq_length: int

    @property
    def tokens(self) -> int:
        """Tokens of the stream."""
        return int(self.pieces["length"].sum())

    @property
    def rows(self) -> int:
        """Sequences that predict every token but the first; the last may be padded."""
        return max(0, -(-(self.tokens - 1) // self.seq_length))

    def part(self, first: int, last: int) -> tuple[np.ndarray, int]:
        """The pieces of rows first to last - 1, and the position in the first of them at which row `first` begins."""
        ends = np.cumsum(self.pieces["length"])
        begin, end = first * self.seq_length, min(last * self.seq_length + 1, self.tokens)
        i = int(np.searchsorted(ends, begin, "right"))
        j = int(np.searchsorted(ends, end, "left")) + 1
        return self.pieces[i:j], begin - (int(ends[i - 1]) if i else 0)
