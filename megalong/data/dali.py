"""How are sequences read through NVIDIA DALI instead of the page cache? One numpy reader per position range.

The reader wants its list of files when a pipeline is built (5 ms), so sequences are read in blocks of `BLOCK`; the
row and the positions of each come from an external source. DALI reads ahead; where the run stands stays with our
cursor, because the order of sequences is given to DALI and not chosen by it. Reads on the CPU (device_id=None), with
or without a GPU in the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

import numpy as np

from megalong.data.dataset import SequenceDataset
from megalong.runtime.errors import ConfigError

BLOCK = 64
READ_AHEAD = 2


def require_dali() -> None:
    """Raise ConfigError, naming the extra, unless DALI is installed."""
    try:
        found = find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia` at all
        found = False
    if not found:
        raise ConfigError(
            "data.loader=dali needs NVIDIA DALI, which is not installed: pip install 'megalong[dali]', "
            "or use data.loader=memmap, which reads long slices faster."
        )


def read_dali(
    dataset: SequenceDataset, sequences: Iterable[int], ranges: list[tuple[int, int]]
) -> Iterator[list[np.ndarray]]:
    """For each sequence, its int32 tokens [start, stop + 1) by range; same values as `read_memmap`.

    Raises:
        DataError: a token id is not below the folder's vocabulary size.
    """
    remaining = iter(sequences)
    while block := list(islice(remaining, BLOCK)):
        pipeline = _pipeline(dataset, block, ranges)
        for sequence in block:
            chunks = [np.array(output.as_cpu().at(0)).reshape(-1) for output in pipeline.run()]
            for chunk in chunks:
                dataset.check_ids(chunk, sequence)
            yield chunks


def _pipeline(dataset: SequenceDataset, block: list[int], ranges: list[tuple[int, int]]) -> Any:
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    places = [dataset.location(sequence) for sequence in block]
    files = [str(path) for path, _ in places]

    def corner(start: int) -> Callable[[Any], np.ndarray]:
        # DALI asks beyond the block while it fills its queue: those answers are never used
        return lambda sample: np.array([places[sample.idx_in_epoch % len(places)][1], start], dtype=np.int32)

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=READ_AHEAD)
    with pipeline:
        outputs = [
            fn.readers.numpy(
                files=files,
                roi_start=fn.external_source(source=corner(start), batch=False),
                roi_shape=[1, stop + 1 - start],
                name=f"range_{start}",
            )
            for start, stop in ranges
        ]
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline
