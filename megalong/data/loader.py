"""What does one rank feed into one micro-batch? Its own two zigzag chunks of one sequence.

Micro-batches are of one sequence. A context-parallel rank reads only the tokens it holds (and the one after each of its
chunks, for the labels); tensor- and pipeline-parallel ranks of the same coordinates read the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypedDict

import numpy as np
import torch

from megalong.attention.zigzag import chunk_ranges
from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset
from megalong.data.order import held_out_samples, shuffled_samples
from megalong.runtime.errors import ConfigError, DataError

Ranges = list[tuple[int, int]]
Fetch = Callable[[SequenceDataset, Iterable[int], Ranges], Iterator[list[np.ndarray]]]
"""Given sequences and position ranges [start, stop), yields for each sequence its tokens [start, stop + 1) by range."""


class MicroBatch(TypedDict):
    """Tensors of one micro-batch on the CPU; B = 1, S the tokens of this context-parallel rank in zigzag order."""

    tokens: torch.Tensor
    """[B, S] int64."""
    labels: torch.Tensor
    """[B, S] int64: the next token of each."""
    loss_mask: torch.Tensor
    """[B, S] float32: 1 where the label is to be predicted, 0 in padding and (intra) across a document boundary."""
    document_starts: torch.Tensor | None
    """[documents] int64, ascending global positions, first 0; None when the whole sequence is one text."""


def training_batches(
    dataset: SequenceDataset,
    *,
    cursor: Cursor,
    seed: int,
    dp_rank: int,
    dp_size: int,
    cp_rank: int,
    cp_size: int,
    document_mask: str = "none",
    loader: str = "memmap",
) -> Iterator[MicroBatch]:
    """Micro-batches of one rank from `cursor` on, without end (epoch after epoch), read one ahead in a thread.

    A step takes global_batch_size / dp_size of them. To resume, build the iterator again at the cursor of the last
    finished step: `cursor.advance(global_batch_size)` after each.

    Args:
        document_mask: none or intra (`attention.document_mask`).
        loader: memmap or dali (`data.loader`).

    Raises:
        DataError: the cursor belongs to other data, or (while iterating) a damaged file.
        ConfigError: unknown loader, or one whose package is not installed.
    """
    cursor.require(dataset)
    if not len(dataset):
        raise DataError(f"{dataset.folder} has no {dataset.split} sequences.")
    samples = shuffled_samples(
        sequences=len(dataset),
        seed=seed,
        consumed_samples=cursor.consumed_samples,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    ranges = chunk_ranges(dataset.seq_length, cp_size, cp_rank)
    fetch = fetcher(loader)
    return _one_ahead(_assemble_all(dataset, samples, ranges, fetch, document_mask))


def evaluation_batches(
    dataset: SequenceDataset,
    *,
    sequences: int,
    dp_rank: int,
    dp_size: int,
    cp_rank: int,
    cp_size: int,
    document_mask: str = "none",
) -> Iterator[MicroBatch]:
    """`sequences` sequences spread over the data, each on one rank, in equally many micro-batches on every rank.

    A rank without a sequence in the last round gets the first one with a loss mask of zeros, so that collectives match.
    """
    ranges = chunk_ranges(dataset.seq_length, cp_size, cp_rank)
    for sequence in held_out_samples(available=len(dataset), sequences=sequences, dp_rank=dp_rank, dp_size=dp_size):
        chunks = next(read_memmap(dataset, [sequence or 0], ranges))
        batch = assemble(dataset, sequence or 0, ranges, chunks, document_mask)
        if sequence is None:
            batch["loss_mask"].zero_()
        yield batch


def assemble(
    dataset: SequenceDataset, sequence: int, ranges: Ranges, chunks: list[np.ndarray], document_mask: str
) -> MicroBatch:
    """A micro-batch from the tokens [start, stop + 1) of each of this rank's position ranges."""
    assert document_mask in ("none", "intra"), document_mask
    tokens = np.concatenate([c[:-1] for c in chunks]).astype(np.int64)
    labels = np.concatenate([c[1:] for c in chunks]).astype(np.int64)
    target = torch.cat([torch.arange(start + 1, stop + 1) for start, stop in ranges])  # position of each label
    mask = target < dataset.valid_length(sequence)
    starts = None
    if document_mask == "intra":
        every = dataset.document_starts(sequence)
        mask &= ~torch.isin(target, every)
        starts = every[every < dataset.seq_length]
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=mask.to(torch.float32)[None],
        document_starts=starts,
    )


def fetcher(loader: str) -> Fetch:
    """The reading strategy of that name.

    Raises:
        ConfigError: no such loader, or its package is not installed.
    """
    if loader == "memmap":
        return read_memmap
    if loader == "dali":
        from megalong.data.dali import read_dali, require_dali

        require_dali()
        return read_dali
    raise ConfigError(f"data.loader={loader!r}: choose memmap or dali.")


def read_memmap(dataset: SequenceDataset, sequences: Iterable[int], ranges: Ranges) -> Iterator[list[np.ndarray]]:
    """Read through the page cache; 2.5 times faster than DALI on slices of a million tokens."""
    for sequence in sequences:
        yield [dataset.read(sequence, start, stop + 1) for start, stop in ranges]


def _assemble_all(
    dataset: SequenceDataset, samples: Iterator[int], ranges: Ranges, fetch: Fetch, document_mask: str
) -> Iterator[MicroBatch]:
    asked: list[int] = []  # taken by `fetch` and not assembled yet: it may read ahead

    def note() -> Iterator[int]:
        for sequence in samples:
            asked.append(sequence)
            yield sequence

    for chunks in fetch(dataset, note(), ranges):
        yield assemble(dataset, asked.pop(0), ranges, chunks, document_mask)


def _one_ahead(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches, the next being read while the last one is used; an error surfaces at its own batch."""
    with ThreadPoolExecutor(1, thread_name_prefix="megalong-loader") as thread:
        coming: Future[MicroBatch] = thread.submit(next, batches)
        while True:
            batch = coming.result()
            coming = thread.submit(next, batches)
            yield batch
