"""What of a layer is neither a matrix product nor attention? RMSNorm, SwiGLU and the rotation of queries and keys.

Each is a function of tensors with its gradient beside it, so that on a GPU each is one kernel forward and one backward
(`runtime/fused.py`); kept for backward is the input alone, or of the rotation nothing but its table. On the CPU
`rms_norm` and `silu_times` run as plain operators, and megatron-core's own modules rotate and gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from megalong.runtime.fused import fused


@fused
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., hidden] over its root mean square, in fp32; rounded to x's dtype before the weight, as transformers."""
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


@fused
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the weight's is summed over rows in fp32."""
    x_fp32 = x.float()
    inverse = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    normed = x_fp32 * inverse
    g_normed = (grad * weight).float()
    g_x = inverse * (g_normed - normed * (g_normed * normed).mean(-1, keepdim=True))
    g_weight = (grad * normed.to(x.dtype)).flatten(0, -2).sum(0, dtype=torch.float32)
    return g_x.to(x.dtype), g_weight.to(weight.dtype)


@fused
def silu_times(wide: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate beside up]; plain, without autograd alone: it writes into what silu gave."""
    gate, up = wide.chunk(2, dim=-1)
    return silu(gate).mul_(up)


@fused
def silu_times_backward(grad: Tensor, wide: Tensor) -> Tensor:
    """Gradient of `wide`."""
    gate, up = wide.chunk(2, dim=-1)
    g_wide = torch.empty_like(wide)
    g_gate, g_up = g_wide.chunk(2, dim=-1)
    g_up.copy_(grad)
    g_up.mul_(silu(gate))
    g_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return g_wide


@fused
def turned(x_SBHD: Tensor, table: Tensor) -> Tensor:
    """Queries or keys rotated; table [2, S, 1, 1, D]: cosines and sines in x's dtype, each half of D alike."""
    first, second = x_SBHD.chunk(2, dim=-1)
    return x_SBHD * table[0] + torch.cat((-second, first), dim=-1) * table[1]


@fused
def turned_back(grad_SBHD: Tensor, table: Tensor) -> Tensor:
    """Gradient of x in `turned`."""
    first, second = (grad_SBHD * table[1]).chunk(2, dim=-1)
    return grad_SBHD * table[0] + torch.cat((second, -first), dim=-1)


class FusedRMSNorm(torch.autograd.Function):
    """`rms_norm` as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return *rms_norm_backward(grad, x, weight, ctx.eps), None


class FusedSwiGLU(torch.autograd.Function):
    """`silu_times` as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(wide)
        return silu_times(wide)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return silu_times_backward(grad, *ctx.saved_tensors)


class FusedRotation(torch.autograd.Function):
    """`turned` as one differentiable step."""

    @staticmethod
    def forward(ctx: Any, x_SBHD: Tensor, table: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        return turned(x_SBHD, table)

    @staticmethod
    def backward(ctx: Any, grad_SBHD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return turned_back(grad_SBHD, *ctx.saved_tensors), None
