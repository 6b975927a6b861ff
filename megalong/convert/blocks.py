"""How do a source's rows become a target's bytes? Block by block: read in the target's order, cast, checked, handed on.

A tensor passes through one block of memory, piece by piece: filled with rows as the target orders them, cast if that
is asked for, and refused if a value is not finite. So memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch

from megalong.convert.finite import require_finite
from megalong.convert.source import Source, as_bytes
from megalong.convert.table import Entry, spans_between

BLOCK = 16 << 20


class Blocks:
    """The tensors of a source as bytes of one dtype. A block is valid until the next one is asked for.

    Args:
        dtype: of the result.
    """

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self.source, self.dtype = source, dtype
        self._block = np.empty(BLOCK, dtype=np.uint8)

    def of_hf(self, name: str, together: int = 1) -> Iterator[np.ndarray]:
        """The bytes of a Hugging Face tensor, from its first row to its last.

        Args:
            together: so many rows are never cut apart (the channels of a head).

        Raises:
            CheckpointError: the source is damaged, or a value is not finite.
        """
        return self._of(self.source.tensors[name].shape, lambda start, stop: [(name, start, stop)], together)

    def of_megatron(self, entry: Entry) -> Iterator[np.ndarray]:
        """The bytes of a megatron tensor, as `of_hf`."""
        return self._of(entry.shape, partial(spans_between, entry))

    def _of(
        self,
        shape: tuple[int, ...],
        spans: Callable[[int, int], Iterable[tuple[str, int, int]]],
        together: int = 1,
    ) -> Iterator[np.ndarray]:
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        for first, last in row_blocks(shape[0], row_bytes * together, together):
            block = self._block[: (last - first) * row_bytes]
            at = 0
            for name, start, stop in spans(first, last):
                part = block[at : at + (stop - start) * row_bytes]
                at += len(part)
                self._fill(part, name, start, stop)
            assert at == len(block), (shape, first, last, at)
            yield block

    def _fill(self, part: np.ndarray, name: str, start: int, stop: int) -> None:
        facts, rows = self.source.tensors[name], partial(self.source.rows, name, start, stop)
        if facts.dtype == self.dtype:
            self.source.read_into(name, start, stop, part)
        else:
            part[:] = as_bytes(rows().to(self.dtype))
        require_finite(part, self.dtype, name, start, facts.shape[1:], self.source.place(name), rows)


def row_blocks(rows: int, unit_bytes: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of the pieces in which a tensor passes through a block.

    A unit longer than a block is an assertion (none exists in a Llama: a row of 16 MiB has 4 million columns of fp32, a
    head of the largest 8 MiB).

    Args:
        unit: rows that stay together.
        unit_bytes: their size.
    """
    assert unit_bytes <= BLOCK, unit_bytes
    step = unit * max(1, BLOCK // max(1, unit_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
