"""One optimizer step: loss and gradients of a global batch, then AdamW, or nothing where they are not finite."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megalong.data.loader import MicroBatch
from megalong.run import Run
from megalong.runtime.watchdog import enter
from megalong.training.adam import choose_adam
from megalong.training.forward import forward_backward
from megalong.training.phases import OPTIMIZER, timed
from megalong.training.schedule import set_rates


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean cross-entropy over the valid tokens of the global batch, nats."""
    valid_tokens: int
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    updated: bool
    """False when the update was left out because loss or gradient were not finite."""


def build_optimizer(run: Run, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over megatron's distributed optimizer (fp32 master weights and moments, sharded over DP x CP).

    Norms and biases are not decayed: megatron gives them a group of their own, whose `wd_mult` of 0 its scheduler
    applies.
    """
    config, settings = run.config, run.config.optimizer
    choose_adam(config.train.adam)
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=run.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.adam_beta1,
            adam_beta2=settings.adam_beta2,
            adam_eps=settings.adam_eps,
            clip_grad=settings.clip_grad,
            bf16=config.precision == "bf16",
            params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
        ),
        model,
        use_gloo_process_groups=dist.get_backend() == "nccl",
    )


def train_step(
    run: Run,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    batches: Iterator[MicroBatch],
    step: int,
) -> StepResult:
    """Do optimizer step `step`, counted from 0. Random generators are a function of seed and step, so that a resumed
    run, on any layout, draws what the unbroken one would have drawn."""
    _seed(run.config.seed, step)
    _set_groups(run, optimizer)
    lr = set_rates(schedule, step)
    optimizer.zero_grad()
    loss, tokens = forward_backward(run.seq_length, model, batches, run.micro_batches)
    enter("optimizer")
    grad_norm, updated = timed(OPTIMIZER, _update, optimizer, loss)
    return StepResult(loss, tokens, grad_norm, lr, updated)


def _set_groups(run: Run, optimizer: MegatronOptimizer) -> None:
    """Give every parameter group the settings of the configuration. Before each step, because a resumed optimizer has
    those that its checkpoint was written with."""
    settings = run.config.optimizer
    for group in optimizer.param_groups:
        group["max_lr"], group["min_lr"] = run.lr, settings.min_lr
        group["betas"] = (settings.adam_beta1, settings.adam_beta2)
        group["eps"] = settings.adam_eps


def _update(optimizer: MegatronOptimizer, loss: float) -> tuple[float, bool]:
    """megatron's `optimizer.step()` in its own parts, with one decision more: a loss or gradient norm that is not
    finite leaves weights and moments as if the step had never been. Both are the same number on every rank.

    Returns:
        gradient norm, and whether the weights were updated.
    """
    with torch.no_grad():
        overflow = optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if overflow or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return grad_norm, False
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if part.config.clip_grad > 0 and part.get_parameters():
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), max_norm=part.config.clip_grad, total_norm=grad_norm
                )
        return grad_norm, bool(optimizer.step_with_ready_grads())


def _seed(seed: int, step: int) -> None:
    torch.manual_seed(seed * 1_000_003 + step)
    np.random.seed((seed * 1_000_003 + step) % 2**32)
    random.seed(seed * 1_000_003 + step)
