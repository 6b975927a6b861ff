"""How is a list of tiles computed with a kernel? Slices in, merged outputs or accumulated gradients out.

All tensors are [B, H or K, S, D] views; nothing is copied or transposed for a tile. Accumulators are fp32
(fp64 for fp64 inputs) whatever the kernel's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megalong.attention.kernels import Grads, Kernel
from megalong.attention.merge import accumulation_dtype, merge_
from megalong.attention.tiles import Tile, Tiles


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


def forward_first(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries to their own chunk or chunks: starts the running (out, lse).

    The causal tiles cover every query exactly once, so nothing has to be initialised and lse is finite everywhere.

    Returns:
        out [B, H, S, D] and lse [B, H, S] in the accumulation dtype.
    """
    wide = accumulation_dtype(q.dtype)
    causal = tuple(t for t in tiles if t.causal)
    if len(causal) == 1:
        out, lse = kernel.forward(q, k, v, True)
        out, lse = out.to(wide), lse.to(wide)
    else:
        out = empty_bhsd(q, wide)
        lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for t in causal:
            part = kernel.forward(_q(q, t), _k(k, t), _k(v, t), True)
            _q(out, t).copy_(part[0])
            lse[:, :, t.q0 : t.q1].copy_(part[1])
    forward_more(kernel, q, k, v, tiles[len(causal) :], out, lse)
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
        part_out, part_lse = kernel.forward(_q(q, t), _k(k, t), _k(v, t), t.causal)
        merge_(_q(out, t), lse[:, :, t.q0 : t.q1], part_out, part_lse)


class Share(NamedTuple):
    """What one tile adds to the gradients of its keys and values, as the kernel returned it."""

    tile: Tile
    dk: torch.Tensor
    dv: torch.Tensor


def backward(
    kernel: Kernel,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: Tiles,
    dq: torch.Tensor,
) -> list[Share]:
    """Add the tiles' query gradients to the accumulator dq [B, H, S, D]; return their shares of dk and dv.

    The shares are added (`add_shares`) when the travelling accumulator has arrived.
    """
    shares = []
    for t in tiles:
        grads = _tile_backward(kernel, dout, q, k, v, out, lse, t)
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


def backward_alone(
    kernel: Kernel,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: Tiles,
) -> Grads:
    """Gradients where the tiles are all there is: causal squares that share neither queries nor keys.

    Each gradient is then written once, in the inputs' dtype, and no fp32 accumulator is needed.
    """
    assert all(t.causal for t in tiles), tiles
    if len(tiles) == 1:
        return kernel.backward(dout, q, k, v, out, lse, True)
    dq, dk, dv = (empty_bhsd(x, x.dtype) for x in (q, k, v))
    for t in tiles:
        grads = _tile_backward(kernel, dout, q, k, v, out, lse, t)
        _q(dq, t).copy_(grads[0])
        _k(dk, t).copy_(grads[1])
        _k(dv, t).copy_(grads[2])
    return dq, dk, dv


def _tile_backward(
    kernel: Kernel,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    t: Tile,
) -> Grads:
    return kernel.backward(_q(dout, t), _q(q, t), _k(k, t), _k(v, t), _q(out, t), lse[:, :, t.q0 : t.q1], t.causal)


def _q(x: torch.Tensor, t: Tile) -> torch.Tensor:
    return x[:, :, t.q0 : t.q1]


def _k(x: torch.Tensor, t: Tile) -> torch.Tensor:
    return x[:, :, t.k0 : t.k1]
