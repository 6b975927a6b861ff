"""How do the a2a and a2a+p2p algorithms compute exact attention? Ranks trade sequence for heads, then attend.

Every rank of a group of `a` gives each other rank its tokens of some heads and gets all tokens of the group for its
own share of the heads (DeepSpeed Ulysses, arXiv 2309.14509). With a equal to CP each rank then holds the whole
sequence for H/a heads. With a2a+p2p a ring remains: the chunks of `a` consecutive ranks, put in order, are exactly the
zigzag shard of a ring of CP/a ranks with chunks a times as long, so the ring of `ring.py` runs as it is (USP, arXiv
2405.07719; megatron-core's hierarchical context parallelism).

Heads travel in pieces: while one piece is attended to, the next arrives and the previous output leaves. A piece is
one key-value head with its queries; where a rank has only one (and no ring), its queries are cut in two.

In names of tensors, beyond the package's legend: A ranks of the group, P key-value heads per rank after the exchange,
T pieces of the queries of one of them; K and H are then what one piece holds of them (K is 1).

Saved for backward are the tensors after the exchange (as large as those before it), so backward moves only dout, dq,
dk and dv: as many bytes as forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megalong.attention import ring as p2p
from megalong.attention.exchange import Exchange, Pending, Ring
from megalong.attention.kept import Kept, results
from megalong.attention.kernel import Attended, Kernel
from megalong.attention.tiles import Tiles
from megalong.attention.zigzag import chunk_ranges


@dataclass(frozen=True)
class Groups:
    """The two process groups of this rank: `inner` trades heads, `outer` is a ring (of one rank for plain a2a)."""

    inner: Exchange
    outer: Ring

    def pieces(self, heads: int, kv_heads: int) -> tuple[int, int]:
        """(key-value heads per rank after the exchange, pieces in which the queries of one such head travel)."""
        per_rank = kv_heads // self.inner.size
        group = heads // kv_heads
        return per_rank, 2 if per_rank == 1 and group % 2 == 0 and self.outer.size == 1 else 1

    def to_heads(self, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Pending]:
        """Start the exchange of parts[j] [S, B, h, D], the heads of rank j, into [a*S, B, h, D] of this rank's heads.

        The rows arrive in the order of the outer ring's zigzag shard.
        """
        s, *rest = parts[0].shape
        whole = parts[0].new_empty(self.inner.size * s, *rest)
        send = [x.contiguous().chunk(2) for x in parts]
        return whole, self.inner.all_to_all("a2a", send, [self._rows(whole, j) for j in range(self.inner.size)])

    def to_sequence(self, whole: torch.Tensor) -> tuple[list[torch.Tensor], Pending]:
        """Start the way back: [a*S, B, h, D] of this rank's heads to a list by rank j of [S, B, h, D], j's heads."""
        whole = whole.contiguous()
        s = whole.shape[0] // self.inner.size
        parts = [whole.new_empty(s, *whole.shape[1:]) for _ in range(self.inner.size)]
        send = [self._rows(whole, j) for j in range(self.inner.size)]
        return parts, self.inner.all_to_all("a2a", send, [x.chunk(2) for x in parts])

    def _rows(self, whole: torch.Tensor, j: int) -> list[torch.Tensor]:
        """The two chunks of rank j among the rows of the whole group."""
        return [whole[a:b] for a, b in chunk_ranges(whole.shape[0], self.inner.size, j)]


class HeadAttention(torch.autograd.Function):
    """The algorithm as one differentiable step; saves q, k, v, out and lse of this rank's heads only."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        groups: Groups,
        steps: tuple[Tiles, ...],
        kernel: Kernel,
        wire_dtype: torch.dtype,
        kept: Kept | None,
    ) -> torch.Tensor:
        a = groups.inner.size
        kv_pieces, q_pieces = groups.pieces(q.shape[2], k.shape[2])
        q_SBAPTHD = q.unflatten(2, (a, kv_pieces, q_pieces, -1))
        k_SBAPKD, v_SBAPKD = (x.unflatten(2, (a, kv_pieces, 1)) for x in (k, v))
        order = [(p, t) for p in range(kv_pieces) for t in range(q_pieces)]

        def arrive(p: int, t: int) -> tuple[torch.Tensor, Pending]:
            with_keys = t == 0
            return groups.to_heads(
                [
                    torch.cat((q_SBAPTHD[:, :, j, p, t], k_SBAPKD[:, :, j, p], v_SBAPKD[:, :, j, p]), 2)
                    if with_keys
                    else q_SBAPTHD[:, :, j, p, t]
                    for j in range(a)
                ]
            )

        saved: list[torch.Tensor] = []
        leaving: list[tuple[list[torch.Tensor], Pending]] = []
        keys = values = q
        packed, arriving = arrive(*order[0])
        for i, (_, t) in enumerate(order):
            now, here = packed, arriving
            if i + 1 < len(order):
                packed, arriving = arrive(*order[i + 1])
            here.wait()
            queries = now
            if t == 0:
                queries, keys, values = now.tensor_split((-2, -1), 2)
            piece = (queries, keys, values, groups.outer, steps, kernel)
            out, lse = results(kept, partial(p2p.forward, *piece))
            leaving.append(groups.to_sequence(out))
            saved += [now, out, lse]
        out_SBAPTHD = torch.empty_like(q_SBAPTHD)
        for (p, t), (parts, pending) in zip(order, leaving, strict=True):
            pending.wait()
            for j, part in enumerate(parts):
                out_SBAPTHD[:, :, j, p, t] = part
        ctx.save_for_backward(*saved)
        ctx.rest = (groups, steps, kernel, wire_dtype, q.shape, k.shape)
        return out_SBAPTHD.flatten(2, 5)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        groups, steps, kernel, wire_dtype, q_shape, k_shape = ctx.rest
        saved = ctx.saved_tensors
        a = groups.inner.size
        kv_pieces, q_pieces = groups.pieces(q_shape[2], k_shape[2])
        dout_SBAPTHD = dout.unflatten(2, (a, kv_pieces, q_pieces, -1))
        order = [(p, t) for p in range(kv_pieces) for t in range(q_pieces)]

        def arrive(p: int, t: int) -> tuple[torch.Tensor, Pending]:
            return groups.to_heads([dout_SBAPTHD[:, :, j, p, t] for j in range(a)])

        leaving: list[tuple[list[torch.Tensor], Pending]] = []
        keys = values = dk = dv = dout
        gradient, arriving = arrive(*order[0])
        for i, (_, t) in enumerate(order):
            now, here = gradient, arriving
            if i + 1 < len(order):
                gradient, arriving = arrive(*order[i + 1])
            here.wait()
            queries, out, lse = saved[3 * i : 3 * i + 3]
            if t == 0:
                queries, keys, values = queries.tensor_split((-2, -1), 2)
            attended = Attended(queries, keys, values, out, lse)
            dq, dk_part, dv_part = p2p.backward(now, attended, groups.outer, steps, kernel, wire_dtype)
            dk, dv = (dk_part, dv_part) if t == 0 else (dk + dk_part, dv + dv_part)
            whole = torch.cat((dq, dk, dv), 2) if t == q_pieces - 1 else dq
            leaving.append(groups.to_sequence(whole))
        dq_SBAPTHD = dout.new_empty(dout_SBAPTHD.shape)
        dk_SBAPKD, dv_SBAPKD = (dout.new_empty(*k_shape).unflatten(2, (a, kv_pieces, 1)) for _ in range(2))
        for (p, t), (parts, pending) in zip(order, leaving, strict=True):
            pending.wait()
            for j, part in enumerate(parts):
                if t == q_pieces - 1:
                    part, dk_SBAPKD[:, :, j, p], dv_SBAPKD[:, :, j, p] = part.tensor_split((-2, -1), 2)
                dq_SBAPTHD[:, :, j, p, t] = part
        return dq_SBAPTHD.flatten(2, 5), dk_SBAPKD.flatten(2, 4), dv_SBAPKD.flatten(2, 4), *(None,) * 5
