"""How does the all_gather algorithm compute exact attention? Every rank gathers all keys and values, queries stay.

The early and the late chunks of all ranks are gathered separately, so that in each gathered tensor a run of
neighbouring chunks is one tile (attention does not care that late chunks lie in descending order), and so that
something is always being computed meanwhile: the own block first, then the early chunks, then the late ones. Backward
gathers again, and the gradients of the early chunks are reduce-scattered while those of the late ones are computed.

Latency is one collective instead of n-1 hops, at the price of memory: all keys and values, and backward their fp32
gradients, on every rank. Meant for short rings or few key-value heads (as in the Llama 3 report, arXiv 2407.21783).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from megalong.attention import blocks
from megalong.attention.blocks import bhsd
from megalong.attention.exchange import Exchange
from megalong.attention.kept import Kept, Results, results
from megalong.attention.kernel import Attended, Kernel
from megalong.attention.merge import accumulation_dtype
from megalong.attention.tiles import Documents, Tiles, halves, joined, tiles
from megalong.attention.zigzag import chunk_ranges


class Plan(NamedTuple):
    """Tiles of one rank: against its own keys, and against the gathered early and late chunks of the others."""

    own: Tiles
    early: Tiles
    late: Tiles


@functools.lru_cache(maxsize=64)
def plan(seq_length: int, size: int, rank: int, documents: Documents) -> Plan:
    """What `rank` computes."""
    queries = chunk_ranges(seq_length, size, rank)
    gathered: list[Tiles] = []
    for half in (0, 1):
        found = []
        for j in range(size):
            keys = chunk_ranges(seq_length, size, j)[half]
            at = j * (keys[1] - keys[0])
            others = tiles(queries, [keys], documents) if j != rank else ()
            found += [t._replace(k0=t.k0 + at, k1=t.k1 + at) for t in others]
        gathered.append(joined(found))
    return Plan(tiles(queries, queries, documents), *gathered)


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Exchange, steps: Plan, kernel: Kernel) -> Results:
    """Attention of local queries [S, B, H, D] to all keys [S, B, K, D] of the group.

    Returns:
        out [S, B, H, D] in q's dtype and lse [B, H, S] in the accumulation dtype.
    """
    (early, early_here), (late, late_here) = _gather(group, k, v)
    q_ = bhsd(q)
    out, lse = blocks.forward_first(kernel, q_, bhsd(k), bhsd(v), steps.own)
    early_here.wait()
    blocks.forward_more(kernel, q_, bhsd(early[0]), bhsd(early[1]), steps.early, out, lse)
    late_here.wait()
    blocks.forward_more(kernel, q_, bhsd(late[0]), bhsd(late[1]), steps.late, out, lse)
    return blocks.sbhd(out, q.dtype), lse


class GatheredAttention(torch.autograd.Function):
    """The algorithm as one differentiable step; saves q, k, v, out and lse only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        group: Exchange,
        steps: Plan,
        kernel: Kernel,
        wire_dtype: torch.dtype,
        kept: Kept | None,
    ) -> torch.Tensor:
        out, lse = results(kept, lambda: forward(q, k, v, group, steps, kernel))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (group, steps, kernel, wire_dtype)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        group, steps, kernel, wire_dtype = ctx.rest
        wide = accumulation_dtype(q.dtype)
        dout_, q_, out_ = bhsd(dout), bhsd(q), bhsd(out)
        dq = blocks.empty_bhsd(q_, wide).zero_()

        def shares(k: torch.Tensor, v: torch.Tensor, of: Tiles) -> list[blocks.Share]:
            return blocks.backward(kernel, dout_, Attended(q_, bhsd(k), bhsd(v), out_, lse), of, dq)

        def scatter(keys: torch.Tensor, values: torch.Tensor, of: Tiles) -> tuple[list[torch.Tensor], Any]:
            total = torch.zeros(2, *keys.shape, dtype=wide, device=q.device)
            blocks.add_shares(total, shares(keys, values, of))
            return group.reduce_scatter(total.to(wire_dtype).unbind())

        first, last = halves(steps.own)
        (early, early_here), (late, late_here) = _gather(group, k, v)
        own = shares(k, v, first)
        early_here.wait()
        d_early, early_sum = scatter(early[0], early[1], steps.early)
        del early
        late_here.wait()
        d_late, late_sum = scatter(late[0], late[1], steps.late)
        del late
        own += shares(k, v, last)
        early_sum.wait()
        late_sum.wait()
        home = torch.stack([torch.cat(halves_).to(wide) for halves_ in zip(d_early, d_late, strict=True)])
        blocks.add_shares(home, own)
        return blocks.sbhd(dq, q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), *(None,) * 5


def _gather(group: Exchange, k: torch.Tensor, v: torch.Tensor) -> list[tuple[list[torch.Tensor], Any]]:
    """Gathers of ([n*c, B, K, D] keys, values) under way: of the early chunks, then of the late ones."""
    return [group.all_gather([x.contiguous() for x in pair]) for pair in zip(k.chunk(2), v.chunk(2), strict=True)]
