"""Exact attention over sequences of a million tokens, spread over a context-parallel group, on any device.

Tensor suffixes used across the package (and wherever a layout matters):
    S  sequence, local to a rank      B  batch            H  query heads of a tensor-parallel rank
    K  key-value heads of a TP rank   D  channels a head  V  vocabulary
so q_SBHD is [S, B, H, D], megatron's order; kernels see [B, H, S, D] views of the same memory.

From the ground up: `zigzag` (who holds which positions), `tiles` (which rectangles must be computed), `kernels` (one
rectangle), `guards` (which kernel must not get it), `merge` (partial results), `blocks` (a list of tiles), `exchange`
and `meters` (moving tensors), `ring` (p2p), `heads` (a2a, a2a+p2p), `gather` (all_gather), `algorithms` (one of them,
on its groups), `core` (megatron's core_attention), `canary` (does it see what it must), `requirements` (what fits,
before anything runs), `traffic` and `memory` (what it costs, closed formulas).

`CoreAttention` is in `megalong.attention.core`, not here: the other names need neither megatron nor a process group.
"""

from megalong.attention.requirements import check
from megalong.attention.tiles import Tile, tiles
from megalong.attention.zigzag import chunk_length, chunk_ranges, local_positions, shard, unshard

__all__ = ["Tile", "check", "chunk_length", "chunk_ranges", "local_positions", "shard", "tiles", "unshard"]
