"""Documents become sequences of one length: long texts whole, the rest one after another.

A document of at least seq_length + 1 tokens is cut into sequences of its own, so that a long window is one text.
What is shorter, and the remainder of what is longer, is laid end to end and cut when a sequence is full. Sequences
advance by seq_length while they hold seq_length + 1 tokens: the last token of one is the first of the next, so every
token after the first of a document is predicted exactly once. Memory is one document and one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sequence:
    """One row of a data folder."""

    tokens: np.ndarray
    """[seq_length + 1] int32 (or uint32)."""
    starts: list[int]
    """Ascending positions at which a document starts (or goes on from another row); the first is 0."""
    valid_length: int
    """Tokens that are text; what follows is padding."""
    source: int | None = None
    """Number of the source it begins in, where sources are known."""


class Packer:
    """Documents in, sequences out, in a fixed order.

    Args:
        seq_length: window; a sequence holds one token more.
        pad: token id that fills the last sequence.
    """

    def __init__(self, seq_length: int, pad: int) -> None:
        self.seq_length = seq_length
        self.pad = pad
        self._pieces: list[np.ndarray] = []
        self._filled = 0

    def add(self, document: np.ndarray) -> Iterator[Sequence]:
        """Sequences that are complete once `document` ([n] int32, end-of-text token included) is there."""
        rest = document
        while len(rest) > self.seq_length:
            yield Sequence(rest[: self.seq_length + 1], [0], self.seq_length + 1)
            rest = rest[self.seq_length :]
        if len(rest) < len(document) and len(rest) == 1:
            return  # the one token left is the label that ended the last sequence
        yield from self._append(rest)

    def finish(self) -> Iterator[Sequence]:
        """The last sequence, padded, if it predicts anything."""
        if self._filled > 1:
            yield self._emit()

    def _append(self, piece: np.ndarray) -> Iterator[Sequence]:
        while len(piece):
            taken = piece[: self.seq_length + 1 - self._filled]
            self._pieces.append(taken)
            self._filled += len(taken)
            ended = len(taken) == len(piece)
            piece = piece[len(taken) :]
            if self._filled == self.seq_length + 1:
                yield self._emit()
                if not ended:
                    piece = np.concatenate([taken[-1:], piece])  # the last label is the next sequence's first token

    def _emit(self) -> Sequence:
        tokens = np.full(self.seq_length + 1, self.pad, dtype=np.int32)
        tokens[: self._filled] = np.concatenate(self._pieces)
        lengths = [len(p) for p in self._pieces]
        starts = [0, *np.cumsum(lengths)[:-1].tolist()]
        sequence = Sequence(tokens, starts, self._filled)
        self._pieces, self._filled = [], 0
        return sequence
