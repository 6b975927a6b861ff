"""How is a list of tiles computed with a kernel? Slices in, merged outputs or accumulated gradients out.

All tensors are [B, H or K, S, D] views; nothing is copied or transposed for a tile. Accumulators are fp32
(fp64 for fp64 inputs) whatever the kernel's dtype. Documents that follow one another on the diagonal go to the kernel
in one call where it can take them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalong.attention.kernel import Attended, CuSeqlens, Grads, Kernel
from megalong.attention.merge import accumulation_dtype, merge_
from megalong.attention.meters import kernel_call
from megalong.attention.tiles import Tile, Tiles


class Call(NamedTuple):
    """One call of a kernel: a tile, or a run of causal squares with their cumulative lengths."""

    tile: Tile
    cu_seqlens: CuSeqlens


class Share(NamedTuple):
    """What one call adds to the gradients of its keys and values, as the kernel returned it."""

    tile: Tile
    dk: torch.Tensor
    dv: torch.Tensor


def calls(tiles: Tiles, kernel: Kernel) -> list[Call]:
    """The kernel calls that compute `tiles`, in order; runs of causal squares are one call where that can be."""
    found: list[Call] = []
    for t in tiles:
        last = found[-1] if found else None
        if kernel.varlen and t.causal and last and last.tile.causal and (last.tile.q1, last.tile.k1) == (t.q0, t.k0):
            run = last.tile._replace(q1=t.q1, k1=t.k1)
            start = last.tile.q0
            found[-1] = Call(run, (*(last.cu_seqlens or (0, t.q0 - start)), t.q1 - start))
        else:
            found.append(Call(t, None))
    return found


def forward_first(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles, alone: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to their own chunk or chunks: starts the running (out, lse).

    The causal tiles cover every query exactly once, so nothing has to be initialised and lse is finite everywhere.

    Args:
        alone: nothing will be merged into the result, so out can stay in q's dtype.

    Returns:
        out [B, H, S, D] and lse [B, H, S] in the accumulation dtype.
    """
    assert not alone or all(t.causal for t in tiles), tiles
    wide = accumulation_dtype(q.dtype)
    out_dtype = q.dtype if alone else wide
    causal = calls(tuple(t for t in tiles if t.causal), kernel)
    if len(causal) == 1:
        out, lse = kernel_call(kernel.forward, q, k, v, True, causal[0].cu_seqlens)
        out, lse = out.to(out_dtype), lse.to(wide)
    else:
        out = empty_bhsd(q, out_dtype)
        lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for t, cu_seqlens in causal:
            part = kernel_call(kernel.forward, _q(q, t), _k(k, t), _k(v, t), True, cu_seqlens)
            _q(out, t).copy_(part[0])
            lse[:, :, t.q0 : t.q1].copy_(part[1])
    forward_more(kernel, q, k, v, tuple(t for t in tiles if not t.causal), out, lse)
    return out, lse


def forward_more(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tiles: Tiles,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge attention to further keys into the running (out, lse), in place."""
    for t in tiles:
        part_out, part_lse = kernel_call(kernel.forward, _q(q, t), _k(k, t), _k(v, t), t.causal)
        merge_(_q(out, t), lse[:, :, t.q0 : t.q1], part_out, part_lse)
        del part_out, part_lse  # before the next call makes its own


def backward(kernel: Kernel, dout: torch.Tensor, attended: Attended, tiles: Tiles, dq: torch.Tensor) -> list[Share]:
    """Add the tiles' query gradients to the accumulator dq [B, H, S, D]; return their shares of dk and dv.

    The shares are added (`add_shares`) when the travelling accumulator has arrived.
    """
    shares = []
    for call in calls(tiles, kernel):
        t = call.tile
        grads = _backward_of(call, kernel, dout, attended)
        _q(dq, t).add_(grads[0])
        shares.append(Share(t, grads[1], grads[2]))
    return shares


def add_shares(dkv: torch.Tensor, shares: list[Share]) -> None:
    """Add shares into dkv [2, S, B, K, D] in place; the sum is formed in the accumulation dtype."""
    if not shares:
        return
    wide = dkv.to(accumulation_dtype(dkv.dtype))
    dk, dv = bhsd(wide[0]), bhsd(wide[1])
    for tile, dk_part, dv_part in shares:
        _k(dk, tile).add_(dk_part)
        _k(dv, tile).add_(dv_part)
    if wide is not dkv:
        dkv.copy_(wide)


def backward_alone(kernel: Kernel, dout: torch.Tensor, attended: Attended, tiles: Tiles) -> Grads:
    """Gradients where the tiles are all there is: causal squares that share neither queries nor keys.

    Each gradient is then written once, in the inputs' dtype, and no fp32 accumulator is needed.
    """
    assert all(t.causal for t in tiles), tiles
    wanted = calls(tiles, kernel)
    if len(wanted) == 1:
        return _backward_of(wanted[0], kernel, dout, attended)
    dq, dk, dv = (empty_bhsd(x, x.dtype) for x in attended[:3])
    for call in wanted:
        t = call.tile
        grads = _backward_of(call, kernel, dout, attended)
        _q(dq, t).copy_(grads[0])
        _k(dk, t).copy_(grads[1])
        _k(dv, t).copy_(grads[2])
    return dq, dk, dv


def bhsd(x_SBHD: torch.Tensor) -> torch.Tensor:
    """The [B, H, S, D] view of a [S, B, H, D] tensor."""
    return x_SBHD.permute(1, 2, 0, 3)


def sbhd(x_BHSD: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The [S, B, H, D] tensor of a [B, H, S, D] accumulator, in the model's dtype (no copy if that is its dtype)."""
    return x_BHSD.permute(2, 0, 1, 3).to(dtype)


def empty_bhsd(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised [B, H, S, D] whose memory order is [S, B, H, D], so that leaving the attention copies nothing."""
    b, h, s, d = like.shape
    return bhsd(torch.empty(s, b, h, d, dtype=dtype, device=like.device))


def _backward_of(call: Call, kernel: Kernel, dout: torch.Tensor, attended: Attended) -> Grads:
    (q, k, v, out, lse), t = attended, call.tile
    part = Attended(_q(q, t), _k(k, t), _k(v, t), _q(out, t), lse[:, :, t.q0 : t.q1])
    return kernel_call(kernel.backward, _q(dout, t), part, t.causal, call.cu_seqlens)


def _q(x: torch.Tensor, t: Tile) -> torch.Tensor:
    return x[:, :, t.q0 : t.q1]


def _k(x: torch.Tensor, t: Tile) -> torch.Tensor:
    return x[:, :, t.k0 : t.k1]
