"""The gradient of the output layer's weight goes straight to its fp32 main gradient, chunk by chunk of the loss.

Autograd adds up what several uses of one parameter give in the parameter's own dtype: over 64 chunks of the loss, bf16
sums lose three times as much as one product does. Here every use adds its share to megatron's fp32 `main_grad`
itself, as megatron does for micro-batches, and nothing of the weight's size is kept from chunk to chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_to_main_grad(weight: torch.nn.Parameter, is_all: bool) -> Tensor:
    """The weight, for one use; in backward that use's gradient goes to `weight.main_grad` and autograd gets none.

    Args:
        weight: a parameter of megatron's `DistributedDataParallel`.
        is_all: whether nothing else in the pass gives this parameter a gradient through autograd.
    """
    return _StraightToMainGrad.apply(weight, is_all)


def add_to_main_grad(weight: Any, grad: Tensor, is_all: bool = True) -> None:
    """Add a share of the weight's gradient, in backward; the function that does so gives autograd None for it.

    Args:
        weight: a parameter of megatron's `DistributedDataParallel`.
        grad: shaped as the weight, any dtype.
        is_all: whether nothing else in the pass gives this parameter a gradient through autograd.
    """
    weight.main_grad.add_(grad)
    if is_all and weight.grad is None:
        # megatron's hook, which runs all the same, insists on a gradient before it lets a bucket be reduced
        weight.grad = torch.zeros((), dtype=weight.dtype, device=weight.device).expand_as(weight)
        weight.grad_added_to_main_grad = True


class _StraightToMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.nn.Parameter, is_all: bool) -> Tensor:  # type: ignore[override]
        ctx.weight, ctx.is_all = weight, is_all
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        add_to_main_grad(ctx.weight, grad, ctx.is_all)
        return None, None
