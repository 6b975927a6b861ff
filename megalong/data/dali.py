"""NVIDIA DALI reads pieces of sequences with its numpy reader, instead of the page cache.

The reader wants its list of files when a pipeline is built (5 ms), so pieces are read in blocks of `BLOCK`; the row and
the positions of each come from an external source. DALI reads ahead; where the run stands stays with our
cursor, because the order of sequences is given to DALI and not chosen by it. Reads on the CPU (device_id=None), with
or without a GPU in the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from megalong.data.dataset import Piece, SequenceDataset

BLOCK = 64
READ_AHEAD = 2


def read_dali(dataset: SequenceDataset, samples: Iterable[Sequence[Piece]]) -> Iterator[list[np.ndarray]]:
    """For each sample, the int32 tokens [start, stop + 1) of its pieces; same values as `read_memmap`.

    Raises:
        DataError: a token id is not below the folder's vocabulary size.
    """
    remaining = iter(samples)
    while block := list(_at_least(remaining, BLOCK)):
        pieces = [piece for sample in block for piece in sample]
        pipeline = _pipeline(dataset, pieces)
        for sample in block:
            chunks = []
            for piece in sample:
                (output,) = pipeline.run()
                chunks.append(np.array(output.as_cpu().at(0)).reshape(-1).view(np.int32))
                dataset.check_ids(chunks[-1], piece.sequence)
            yield chunks


def _at_least(samples: Iterator[Sequence[Piece]], pieces: int) -> Iterator[Sequence[Piece]]:
    """Samples, until they have so many pieces."""
    while pieces > 0 and (sample := next(samples, None)) is not None:
        yield sample
        pieces -= len(sample)


def _pipeline(dataset: SequenceDataset, pieces: list[Piece]) -> Any:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    places = [dataset.location(piece.sequence) for piece in pieces]
    files = [str(path) for path, _ in places]

    def corner(values: Callable[[int], tuple[int, int]]) -> Any:
        # DALI asks beyond the block while it fills its queue: those answers are never used
        def of(sample: Any) -> np.ndarray:
            return np.array(values(sample.idx_in_epoch % len(pieces)), dtype=np.int32)

        return fn.external_source(source=of, batch=False)

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=READ_AHEAD)
    with pipeline:
        output = fn.readers.numpy(
            files=files,
            roi_start=corner(lambda i: (places[i][1], pieces[i].start)),
            roi_shape=corner(lambda i: (1, pieces[i].stop + 1 - pieces[i].start)),
        )
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline
