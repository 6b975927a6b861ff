"""Which operator computes one tile, forward and backward? One small protocol over PyTorch's own kernels.

A kernel knows "full" and "causal" (square), returns the output with its log-sum-exp, and differentiates a tile
given the *final* output and log-sum-exp of its queries. With those, P = exp(s - lse) is the tile's share of the
whole softmax, so the gradients of a tile are exact partial sums of the whole gradients, in any order.

GQA is native: keys and values have K heads, queries H, K divides H, and nothing is repeated.
CUDA kernels are in `kernels_cuda.py`. The reference materialises the scores and is for tests and small checks.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch

from megalong.attention.merge import accumulation_dtype
from megalong.attention.requirements import KERNELS
from megalong.runtime.errors import ConfigError

Cuts = tuple[int, ...] | None
"""Rows 0 = c0 < c1 < ... < cm = S between which lie m causal squares, one after another on the diagonal."""
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel(Protocol):
    """Attention over one tile. Tensors are views in any memory order whose last dimension is contiguous."""

    name: str
    varlen: bool
    """Whether a causal call may have `cuts`: many documents in one call. Else they come one by one."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cuts: Cuts = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of q [B, H, Sq, D] and k, v [B, K, Sk, D].

        out is [B, H, Sq, D] in the inputs' dtype, lse [B, H, Sq] in the accumulation dtype.
        """
        ...

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        cuts: Cuts = None,
    ) -> Grads:
        """(dq, dk, dv) of this tile, shaped as q, k, v; out and lse are the final ones of the queries."""
        ...


class CpuFlash:
    """PyTorch's CPU flash attention (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp32, fp64, bf16, fp16."""

    name = "cpu_flash"
    varlen = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cuts: Cuts = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cuts is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=self.scale)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        cuts: Cuts = None,
    ) -> Grads:
        assert cuts is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, scale=self.scale
        )


class Reference:
    """Attention by its definition, in the accumulation dtype, with all scores in memory. Any device."""

    name = "reference"
    varlen = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cuts: Cuts = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores, v_ = self._scores(q, k, causal, cuts), v.to(accumulation_dtype(v.dtype)).unsqueeze(2)
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse.unsqueeze(-1)) @ v_
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        cuts: Cuts = None,
    ) -> Grads:
        groups, wide = k.shape[1], accumulation_dtype(q.dtype)
        q_, dout_, out_ = (x.to(wide).unflatten(1, (groups, -1)) for x in (q, dout, out))
        k_, v_ = (x.to(wide).unsqueeze(2) for x in (k, v))
        p = torch.exp(self._scores(q, k, causal, cuts) - lse.to(wide).unflatten(1, (groups, -1)).unsqueeze(-1))
        dp = dout_ @ v_.transpose(-1, -2)
        ds = p * (dp - (dout_ * out_).sum(-1, keepdim=True)) * self.scale
        dq = (ds @ k_).flatten(1, 2)
        dk = (ds.transpose(-1, -2) @ q_).sum(2)
        dv = (p.transpose(-1, -2) @ dout_).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: torch.Tensor, k: torch.Tensor, causal: bool, cuts: Cuts) -> torch.Tensor:
        """Scaled scores [B, K, H/K, Sq, Sk], -inf where a query may not look."""
        wide = accumulation_dtype(q.dtype)
        scores = q.to(wide).unflatten(1, (k.shape[1], -1)) @ k.to(wide).unsqueeze(2).transpose(-1, -2) * self.scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            for a, b in pairwise(cuts or (0, q.shape[2])):
                hidden[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores


def select(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, scale: float) -> Kernel:
    """The kernel called `name` in the configuration; `auto` chooses by device, dtype and head dim.

    Args:
        scale: factor of the scores, usually head_dim ** -0.5.

    Raises:
        ConfigError: the name is unknown, or that kernel cannot run these tensors.
    """
    from megalong.attention import kernels_cuda

    if name not in KERNELS:
        raise ConfigError(f"attention.kernel={name} is unknown: choose one of {', '.join(KERNELS)}.")
    if name == "auto":
        name = "cuda_flash" if device.type == "cuda" else "cpu_flash"
    if name == "reference":
        return Reference(scale)
    if name == "cpu_flash":
        if device.type != "cpu":
            raise ConfigError(f"attention.kernel=cpu_flash cannot run on {device.type}: use auto, cuda_flash or cudnn.")
        return CpuFlash(scale)
    if device.type != "cuda":
        raise ConfigError(f"attention.kernel={name} needs a CUDA device, here is {device.type}: use auto or cpu_flash.")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"attention.kernel={name} computes in bf16 or fp16, not in {dtype}: set precision=bf16 "
            "(attention.kernel=reference runs any dtype, but only for short windows)."
        )
    kernel = kernels_cuda.CudaFlash(scale) if name == "cuda_flash" else kernels_cuda.CudnnFlash(scale)
    if head_dim % 8 or head_dim > kernel.max_head_dim:
        raise ConfigError(
            f"attention.kernel={kernel.name} needs a head dim that is a multiple of 8 and at most "
            f"{kernel.max_head_dim}, not {head_dim}."
        )
    return kernel
