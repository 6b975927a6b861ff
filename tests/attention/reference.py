"""What is the right answer? Attention by its definition in fp64, and how far a result is from it."""

from __future__ import annotations

import math

import torch


def allowed(seq_length: int, documents: tuple[int, ...] | None) -> torch.Tensor:
    """bool [L, L]: query may see key."""
    position = torch.arange(seq_length)
    mask = position[:, None] >= position[None, :]
    if documents is not None:
        owner = torch.bucketize(position, torch.tensor(documents), right=True)
        mask &= owner[:, None] == owner[None, :]
    return mask


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, documents: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, dq, dk, dv) in fp64, [L, B, heads, D], by softmax and autograd over repeated keys."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    repeat = q.shape[2] // k.shape[2]
    k_, v_ = (x.repeat_interleave(repeat, 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k_) / math.sqrt(q.shape[-1])
    p = scores.masked_fill(~allowed(q.shape[0], documents), float("-inf")).softmax(-1)
    out = torch.einsum("bhqk,kbhd->qbhd", p, v_)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())


def relative_l2(found: torch.Tensor, right: torch.Tensor) -> float:
    """||found - right|| / ||right||."""
    return ((found.double() - right).norm() / right.norm().clamp_min(1e-300)).item()


def inputs(seq_length: int, batch: int, heads: int, kv_heads: int, head_dim: int, seed: int = 0) -> list[torch.Tensor]:
    """Seeded q, k, v, dout, fp64 values that bf16 and fp32 round."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(seq_length, batch, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
