"""Which sequence is sample c of a run, and who reads it?

The order is a function of (seed, epoch) alone. Sample c of the global order belongs to micro-batch m of data-parallel
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


def shuffled_samples(*, sequences: int, seed: int, consumed_samples: int, dp_rank: int, dp_size: int) -> Iterator[int]:
    """Sequence indices that one data-parallel rank trains on, one per micro-batch, without end.

    Args:
        sequences: number of sequences in the data; an epoch visits each once.
        consumed_samples: position in the global order at which the step begins.
    """
    assert sequences > 0
    sample = consumed_samples + dp_rank
    epoch, order = -1, np.empty(0, np.int64)
    while True:
        if sample // sequences != epoch:
            epoch = sample // sequences
            order = epoch_order(seed, epoch, sequences)
        yield int(order[sample % sequences])
        sample += dp_size


def held_out_samples(*, available: int, sequences: int, dp_rank: int, dp_size: int) -> list[int | None]:
    """`sequences` of the `available` ones, evenly spread (neighbours are often one document), shared out over ranks.

    Returns:
        equally many entries on every data-parallel rank, padded by None.
    """
    assert 0 < sequences <= available, (sequences, available)
    rounds = -(-sequences // dp_size)
    mine = [m * dp_size + dp_rank for m in range(rounds)]
    return [i * available // sequences if i < sequences else None for i in mine]
