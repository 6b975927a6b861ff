"""Optimizers and multi-tensor functions (transformer_engine/pytorch/optimizers and transformer_engine_torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedSGD:
    """megatron-core imports it beside FusedAdam."""


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step count lies in its groups."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        assert adam_w_mode
        assert not amsgrad
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        """One update, in the order of operations of torch's AdamW."""
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            correction = [1 - beta ** group["step"] if group["bias_correction"] else 1 for beta in (first, second)]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(p.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                root = state["exp_avg_sq"].sqrt().div_(correction[1] ** 0.5).add_(group["eps"])
                p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / correction[0])


def multi_tensor_applier(op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: Any, *args: Any) -> Any:
    """The operator on all tensors."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm over all tensors, [1]."""
    assert not per_tensor
    return torch.stack([t.float().norm() for t in tensor_lists[0]]).norm()[None], torch.empty(0)


def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """tensor_lists[1] = tensor_lists[0] * scale."""
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)
