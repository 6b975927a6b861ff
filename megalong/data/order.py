"""The order of sequences is a permutation for every epoch, keyed by the seed; replicas take turns in it.

It is a function of (seed, epoch) alone. Sample c of the global order belongs to micro-batch m of data-parallel
rank d with c = step_start + m * dp_size + d, so ranks may come and go between steps and the order stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(seed: int, epoch: int, sequences: int) -> np.ndarray:
    """The order in which epoch `epoch` visits the sequences: a permutation [sequences] int64.

    Sorted by the raw output of a counter-based generator, which numpy keeps the same from version to version;
    it does not promise that of `Generator.permutation`.
    """
    keys = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(sequences)
    return np.argsort(keys, kind="stable")


def shuffled_samples(
    *, sequences: int, seed: int, consumed_samples: int, dp_rank: int, dp_size: int, rows: int = 1
) -> Iterator[tuple[int, ...]]:
    """Sequence indices that one data-parallel rank trains on, those of one sample per micro-batch, without end.

    Args:
        sequences: number of sequences in the data; an epoch visits each once.
        consumed_samples: position in the global order at which the step begins.
        rows: sequences of a sample: sample c is those at places c * rows to c * rows + rows - 1. An epoch may end
            inside a sample.
    """
    assert sequences > 0
    sample = consumed_samples + dp_rank
    epoch, order = -1, np.empty(0, np.int64)
    while True:
        found = []
        for place in range(sample * rows, (sample + 1) * rows):
            if place // sequences != epoch:
                epoch = place // sequences
                order = epoch_order(seed, epoch, sequences)
            found.append(int(order[place % sequences]))
        yield tuple(found)
        sample += dp_size


def held_out_samples(
    *, available: int, sequences: int, dp_rank: int, dp_size: int, rows: int = 1
) -> list[tuple[int | None, ...]]:
    """`sequences` of the `available` ones, evenly spread (neighbours are often one document), shared out over ranks.

    Returns:
        samples of `rows` sequences, equally many on every data-parallel rank; what is missing is None.
    """
    assert 0 < sequences <= available, (sequences, available)
    rounds = -(-sequences // (rows * dp_size))
    mine = [range(i * rows, (i + 1) * rows) for i in range(dp_rank, rounds * dp_size, dp_size)]
    return [tuple(i * available // sequences if i < sequences else None for i in places) for places in mine]
