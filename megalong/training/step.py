"""What happens in one optimizer step? Forward and backward over the micro-batches, one exact mean, AdamW.

The loss is a sum over valid tokens; gradients are divided once by the global number of valid tokens
(`calculate_per_token_loss`), so neither accumulation, nor context parallelism, nor uneven masks change them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megalong.config.schema import Config
from megalong.data.loader import MicroBatch
from megalong.runtime import device
from megalong.runtime.watchdog import enter
from megalong.training.schedule import learning_rate


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


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over megatron's distributed optimizer (fp32 master weights and moments, sharded over DP x CP)."""
    settings = config.optimizer
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.train.lr,
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


def forward_backward(
    config: Config, model: list[DistributedDataParallel], batches: Iterator[MicroBatch], micro_batches: int
) -> tuple[float, int]:
    """Loss and gradients of one global batch; gradients end up in `main_grad`, reduced and divided.

    Returns:
        mean loss over valid tokens, and their number, both global.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    sums = _run(config, model, batches, micro_batches, forward_only=False, loss=_loss_and_sum)
    total, count = _sum_over_world(sums, (2,)).tolist()
    return total / max(count, 1.0), int(count)


def train_step(
    config: Config,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    batches: Iterator[MicroBatch],
    step: int,
) -> StepResult:
    """Do optimizer step `step`, counted from 0. Random generators are a function of seed and step, so that a resumed
    run, on any layout, draws what the unbroken one would have drawn."""
    _seed(config.seed, step)
    lr = learning_rate(step, config.train.lr or 0.0, config.optimizer.warmup_steps)
    assert config.train.global_batch_size is not None
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    micro_batches = config.train.global_batch_size // (config.topology.dp or 1)
    loss, tokens = forward_backward(config, model, batches, micro_batches)
    enter("optimizer")
    grad_norm, updated = _update(optimizer, loss)
    return StepResult(loss, tokens, grad_norm, lr, updated)


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


def losses_of(
    config: Config,
    model: list[DistributedDataParallel],
    batches: Iterator[MicroBatch],
    micro_batches: int,
    reduce: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, ...],
) -> Tensor:
    """Forward only; `reduce(losses [B, S], loss_mask [B, S])` of shape `size` is summed over micro-batches and ranks.

    Returns:
        the sum in fp64, on every rank.
    """
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with torch.no_grad():
        loss = partial(_reduced, reduce=reduce)
        sums = _run(config, model, batches, micro_batches, forward_only=True, loss=loss)
    for chunk, was in zip(model, training, strict=True):
        chunk.train(was)
    return _sum_over_world(sums, size)


def _run(
    config: Config,
    model: list[DistributedDataParallel],
    batches: Iterator[MicroBatch],
    micro_batches: int,
    *,
    forward_only: bool,
    loss: Any,
) -> list[dict[str, Tensor]]:
    target = device.device()

    def forward_step(source: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        enter("reading data")
        batch = next(source)
        enter("forward and backward")
        mask = batch["loss_mask"].to(target)
        losses = chunk(
            input_ids=batch["tokens"].to(target),
            position_ids=None,
            attention_mask=batch["document_starts"],
            labels=batch["labels"].to(target),
        )
        return losses, partial(loss, mask=mask)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=micro_batches,
        seq_length=config.stage.seq_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _loss_and_sum(losses_BS: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """megatron's triple: sum of losses (what backward starts from), local valid tokens, what to report."""
    total = (losses_BS.float() * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), {"sums": torch.stack((total.detach(), count)).double()}


def _reduced(losses_BS: Tensor, mask: Tensor, reduce: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count, _ = _loss_and_sum(losses_BS, mask)
    return total, count, {"sums": reduce(losses_BS.float(), mask).double()}


def _sum_over_world(reports: list[dict[str, Tensor]], size: tuple[int, ...]) -> Tensor:
    """Sum the reports of all micro-batches over all ranks; only the last pipeline stage has any, and tensor-parallel
    ranks hold copies, of which the first counts. The result, of shape `size`, is on every rank."""
    total = torch.zeros(size, dtype=torch.float64, device=device.device())
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for report in reports:
            total += report["sums"]
    dist.all_reduce(total)
    return total
