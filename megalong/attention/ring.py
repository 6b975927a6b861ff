"""How does the p2p algorithm compute exact attention over a ring? Keys and values travel, queries stay.

Rank i starts with its own keys and values. While it attends to the block it holds, that block moves on to rank i+1
and the next one arrives from rank i-1 in a second buffer: n-1 hops of one block for n ranks. Zigzag sharding makes
every step the same amount of work, and without documents one kernel call (Ring Attention, arXiv 2310.01889; striped
and zigzag variants, arXiv 2311.09431 and zhuzilin/ring-flash-attention).

Backward, keys and values travel again and their gradients follow one step behind, in fp32: the rank that holds a
block adds its share and passes it on. A rank's own block needs no travel, so gradients make n-1 hops too. Half of
the own block is computed first, while the first keys arrive, and half last, while the gradients come home.

Every rank receives what it needs and nothing twice: rank 0 holds the last chunk and needs all keys, so the busiest
link carries n-1 blocks in any scheme.

Memory besides the local q, k, v, out, lse (and dout): two blocks of keys and values; forward the running fp32 out;
backward fp32 dq and two blocks of fp32 dk and dv. Formulas: `memory.py`, and of the bytes moved `traffic.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from megalong.attention import blocks
from megalong.attention.blocks import bhsd
from megalong.attention.exchange import Move, Ring
from megalong.attention.kept import Kept, results
from megalong.attention.kernel import Attended, Grads, Kernel
from megalong.attention.merge import accumulation_dtype
from megalong.attention.tiles import Documents, Tiles, halves, tiles
from megalong.attention.zigzag import chunk_ranges


@functools.lru_cache(maxsize=64)
def plan(seq_length: int, size: int, rank: int, documents: Documents) -> tuple[Tiles, ...]:
    """Tiles of ring step s = 0..size-1, in which `rank` holds the keys of rank - s."""
    if size == 1:
        whole = [(0, seq_length)]
        return (tiles(whole, whole, documents),)
    own = chunk_ranges(seq_length, size, rank)
    return tuple(tiles(own, chunk_ranges(seq_length, size, (rank - s) % size), documents) for s in range(size))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ring: Ring, steps: tuple[Tiles, ...], kernel: Kernel
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of local queries to the keys of the whole ring.

    Args:
        q: local queries [S, B, H, D].
        k, v: local keys and values [S, B, K, D].
        steps: `plan(...)` of this rank.

    Returns:
        out [S, B, H, D] in q's dtype and lse [B, H, S] in the accumulation dtype.
    """
    q_ = bhsd(q)
    if ring.size == 1:
        out, lse = blocks.forward_first(kernel, q_, bhsd(k), bhsd(v), steps[0], alone=True)
        return blocks.sbhd(out, q.dtype), lse
    here = torch.stack((k, v))
    there = torch.empty_like(here)
    moving = ring.shift(("ring_kv", here, there))
    out, lse = blocks.forward_first(kernel, q_, bhsd(here[0]), bhsd(here[1]), steps[0])
    for s in range(1, ring.size):
        moving.wait()
        here, there = there, here
        if s + 1 < ring.size:
            moving = ring.shift(("ring_kv", here, there))
        blocks.forward_more(kernel, q_, bhsd(here[0]), bhsd(here[1]), steps[s], out, lse)
    return blocks.sbhd(out, q.dtype), lse


def backward(
    dout: torch.Tensor,
    attended: Attended,
    ring: Ring,
    steps: tuple[Tiles, ...],
    kernel: Kernel,
    wire_dtype: torch.dtype,
) -> Grads:
    """Gradients (dq [S, B, H, D], dk, dv [S, B, K, D]) of `forward`, in the inputs' dtypes.

    Args:
        attended: arguments and results of `forward`.
        wire_dtype: dtype in which dk and dv travel; they are always accumulated in the accumulation dtype.
    """
    q, k, v, out, lse = attended
    dout_, q_, out_ = bhsd(dout), bhsd(q), bhsd(out)
    if ring.size == 1:
        grads = blocks.backward_alone(kernel, dout_, Attended(q_, bhsd(k), bhsd(v), out_, lse), steps[0])
        return tuple(blocks.sbhd(g, g.dtype) for g in grads)  # type: ignore[return-value]

    dq = blocks.empty_bhsd(q_, accumulation_dtype(q.dtype)).zero_()

    def shares(k: torch.Tensor, v: torch.Tensor, of: Tiles) -> list[blocks.Share]:
        return blocks.backward(kernel, dout_, Attended(q_, bhsd(k), bhsd(v), out_, lse), of, dq)

    first, last = halves(steps[0])
    here = torch.stack((k, v))
    there = torch.empty_like(here)
    moving = ring.shift(("ring_kv", here, there))
    held = shares(k, v, first)
    moving.wait()
    grad = torch.zeros_like(here, dtype=wire_dtype)
    grad_there = torch.empty_like(grad)
    for s in range(1, ring.size):
        here, there = there, here
        moves: list[Move] = [("ring_kv", here, there)] if s + 1 < ring.size else []
        if s > 1:
            moves.append(("ring_dkv", grad, grad_there))
        moving = ring.shift(*moves)
        found = shares(here[0], here[1], steps[s])
        moving.wait()
        if s > 1:
            grad, grad_there = grad_there, grad
        blocks.add_shares(grad, found)
        del found  # before the next step makes its own
    del here, there
    moving = ring.shift(("ring_dkv", grad, grad_there))
    held += shares(k, v, last)
    moving.wait()
    home = grad_there.to(accumulation_dtype(k.dtype))
    blocks.add_shares(home, held)
    return blocks.sbhd(dq, q.dtype), home[0].to(k.dtype), home[1].to(v.dtype)


class RingAttention(torch.autograd.Function):
    """`forward` and `backward` of this module as one differentiable step; saves q, k, v, out and lse only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ring: Ring,
        steps: tuple[Tiles, ...],
        kernel: Kernel,
        wire_dtype: torch.dtype,
        kept: Kept | None,
    ) -> torch.Tensor:
        out, lse = results(kept, lambda: forward(q, k, v, ring, steps, kernel))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (ring, steps, kernel, wire_dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (*backward(dout, Attended(*ctx.saved_tensors), *ctx.rest), *(None,) * 5)
