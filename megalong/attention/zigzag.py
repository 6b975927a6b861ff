"""Which positions of a sequence does each context-parallel rank hold? The one home of sequence sharding.

A sequence of L tokens is cut in 2*CP chunks of equal length; rank r holds chunk r ("early") and chunk
2*CP-1-r ("late"), in that order, as megatron-core's `get_batch_on_this_cp_rank` does, so that every rank has
the same amount of causal work. With CP 1 the two chunks are the whole sequence in its own order.

Data, loss, rotary embedding, evaluation and attention all ask this module; nothing else knows the rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalong.runtime.errors import LayoutError

if TYPE_CHECKING:  # the planner asks this package for ranges and bytes, and answers before torch would be loaded
    import torch

Range = tuple[int, int]
"""Half-open interval [start, stop) of global token positions."""


def chunk_length(seq_length: int, cp_size: int) -> int:
    """Tokens in one of the 2*CP chunks.

    Raises:
        LayoutError: `seq_length` is not divisible by 2*cp_size.
    """
    chunks = 2 * cp_size
    if seq_length < chunks or seq_length % chunks:
        raise LayoutError(
            f"A window of {seq_length} tokens cannot be cut in 2*cp={chunks} equal chunks: "
            f"choose topology.cp so that 2*cp divides {seq_length}, or a window that is a multiple of {chunks}."
        )
    return seq_length // chunks


def chunk_ranges(seq_length: int, cp_size: int, cp_rank: int) -> list[Range]:
    """Global [start, stop) of the two chunks of `cp_rank`, in the order in which they lie in its tensors.

    Raises:
        LayoutError: `seq_length` is not divisible by 2*cp_size.
    """
    assert 0 <= cp_rank < cp_size, (cp_rank, cp_size)
    c = chunk_length(seq_length, cp_size)
    late = 2 * cp_size - 1 - cp_rank
    return [(cp_rank * c, (cp_rank + 1) * c), (late * c, (late + 1) * c)]


def local_positions(seq_length: int, cp_size: int, cp_rank: int, device: torch.device | None = None) -> torch.Tensor:
    """Global positions of the tokens of `cp_rank`, int64 [seq_length / cp_size], in local order."""
    import torch

    return torch.cat([torch.arange(a, b, device=device) for a, b in chunk_ranges(seq_length, cp_size, cp_rank)])


def shard(x: torch.Tensor, cp_size: int, cp_rank: int, dim: int = 0) -> torch.Tensor:
    """The part of `cp_rank` of a full tensor along its sequence dimension `dim` (a copy unless CP is 1)."""
    import torch

    if cp_size == 1:
        return x
    ranges = chunk_ranges(x.shape[dim], cp_size, cp_rank)
    return torch.cat([x.narrow(dim, a, b - a) for a, b in ranges], dim)


def unshard(shards: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The full tensor from the shards of all ranks, in rank order: the inverse of `shard`."""
    import torch

    if len(shards) == 1:
        return shards[0]
    halves = [s.chunk(2, dim) for s in shards]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim)
