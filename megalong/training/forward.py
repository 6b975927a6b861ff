"""Forward and backward over the micro-batches of a global batch, on every layout, with one exact mean.

The loss is a sum over valid tokens; gradients are divided once by the global number of valid tokens
(`calculate_per_token_loss`), so neither accumulation, nor context parallelism, nor uneven masks change them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megalong.data.loader import MicroBatch
from megalong.runtime import device
from megalong.runtime.watchdog import enter, part
from megalong.training.phases import DATA, timed


def forward_backward(
    seq_length: int, model: list[DistributedDataParallel], batches: Iterator[MicroBatch], micro_batches: int
) -> tuple[float, int]:
    """Loss and gradients of one global batch; gradients end up in `main_grad`, reduced and divided.

    Returns:
        mean loss over valid tokens, and their number, both global.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    phase = "forward and backward"
    sums = _run(seq_length, model, batches, micro_batches, forward_only=False, loss=_loss_and_sum, phase=phase)
    total, count = _sum_over_world(sums, (2,)).tolist()
    return total / max(count, 1.0), int(count)


def losses_of(
    seq_length: int,
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
        sums = _run(seq_length, model, batches, micro_batches, forward_only=True, loss=loss, phase="evaluating")
    for chunk, was in zip(model, training, strict=True):
        chunk.train(was)
    return _sum_over_world(sums, size)


def _run(
    seq_length: int,
    model: list[DistributedDataParallel],
    batches: Iterator[MicroBatch],
    micro_batches: int,
    *,
    forward_only: bool,
    loss: Any,
    phase: str,
) -> list[dict[str, Tensor]]:
    target = device.device()
    numbers = itertools.count(1)

    def forward_step(source: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        number = next(numbers)
        enter("reading data")
        part("micro-batch", number, micro_batches)
        batch = timed(DATA, next, source)
        enter(phase)
        part("micro-batch", number, micro_batches)
        # from pinned memory: the host goes on while they are copied
        tokens, labels, mask = (batch[k].to(target, non_blocking=True) for k in ("tokens", "labels", "loss_mask"))
        losses = chunk(
            input_ids=tokens,
            position_ids=None,
            # not a mask: boundaries travel by the one tensor that recompute hands to attention again
            attention_mask=batch["document_starts"],
            labels=labels,
        )
        return losses, partial(loss, mask=mask)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=model,
        num_microbatches=micro_batches,
        seq_length=seq_length,
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
