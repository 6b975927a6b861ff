"""Samples are scored in the training layout by one forward pass each: no cache, no conversion, no generation.

Tensor, context, pipeline and data parallelism are those of the model. A sample is padded behind its end to the next
length that the layout can cut; nothing attends to what comes later, so the padding changes nothing. Samples of equal
padded length go through the pipeline together. The rotary frequencies are those of the sample's own length, as
transformers takes them: rope types that depend on it (dynamic, longrope) give what a server would compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megalong.attention.zigzag import local_positions, shard
from megalong.evaluation.sample import NOWHERE, Sample, Slot
from megalong.rope.frequencies import rotary_frequencies
from megalong.run import Run
from megalong.runtime import device
from megalong.runtime.watchdog import enter

COLUMNS = 4  # of a slot: loss, hits, tokens, greedy ids


def score(
    run: Run,
    model: Sequence[torch.nn.Module],
    samples: Sequence[Sample],
    slots: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Slot]:
    """Score samples on all ranks of the model's layout; every rank calls this with the same samples.

    Args:
        model: what `gpt.build` or `gpt.build_module` made for `run`.
        slots: how many slots the samples count in.
        progress: called with the padded tokens that have been scored since the last call.

    Returns:
        one entry per slot, the same on every rank.
    """
    total = torch.zeros(slots, COLUMNS, dtype=torch.float64, device=device.device())
    dp, pp = parallel_state.get_data_parallel_world_size(), parallel_state.get_pipeline_model_parallel_world_size()
    with torch.no_grad(), _scoring(model):
        for (padded, length), group in _by_length(samples).items():
            with _at_length(run, model, padded, length):
                step = dp * pp  # enough to fill the pipeline
                for start in range(0, len(group), step):
                    some = group[start : start + step]
                    _run(run, model, some, padded, total)
                    progress(padded * len(some))
    if not (parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0):
        total.zero_()  # tensor-parallel ranks hold copies
    dist.all_reduce(total)
    return [Slot(loss, int(hits), int(tokens), int(last)) for loss, hits, tokens, last in total.tolist()]


def padded_length(tokens: int, tp: int, cp: int) -> int:
    """Input tokens that the layout can cut: the next multiple of 2 * cp * tp."""
    multiple = 2 * cp * tp
    return -(-tokens // multiple) * multiple


def scored_tokens(samples: Sequence[Sample], tp: int, cp: int) -> int:
    """What `progress` of `score` adds up to."""
    return sum(padded_length(len(s.tokens) - 1, tp, cp) for s in samples)


def _by_length(samples: Sequence[Sample]) -> dict[tuple[int, int], list[Sample]]:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    cp = parallel_state.get_context_parallel_world_size()
    groups: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        length = len(sample.tokens) - 1
        groups.setdefault((padded_length(length, tp, cp), length), []).append(sample)
    return groups


def _inner(chunk: torch.nn.Module) -> Any:
    while isinstance(getattr(chunk, "module", None), torch.nn.Module):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


@contextmanager
def _scoring(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    was = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
        _inner(chunk).scoring = True
    try:
        yield
    finally:
        for chunk, training in zip(model, was, strict=True):
            chunk.train(training)
            _inner(chunk).scoring = False


@contextmanager
def _at_length(run: Run, model: Sequence[torch.nn.Module], padded: int, length: int) -> Iterator[None]:
    assert len(model) == 1
    inv_freq, _ = rotary_frequencies(
        run.theta,
        run.model.head_dim,
        run.rope_scaling,
        max_position_embeddings=run.seq_length,
        sequence_length=length,
    )
    with _inner(model[0]).rotary_pos_emb.at_length(padded, inv_freq):
        yield


def _run(run: Run, model: Sequence[torch.nn.Module], samples: Sequence[Sample], padded: int, total: Tensor) -> None:
    """Add the slots of at most dp * rounds samples to `total`."""
    cp, cp_rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    dp, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rounds = -(-len(samples) // dp)
    starts = torch.zeros(1, dtype=torch.int64) if run.config.attention.document_mask == "intra" else None
    positions = local_positions(padded, cp, cp_rank)

    def micro_batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i in range(rounds):
            mine = i * dp + dp_rank
            sample = samples[min(mine, len(samples) - 1)]
            inputs, labels, slots = (torch.full((padded,), fill) for fill in (0, 0, NOWHERE))
            n = len(sample.tokens) - 1
            inputs[:n], labels[:n] = sample.tokens[:-1], sample.tokens[1:]
            if mine < len(samples):
                slots[:n] = sample.slots[1:]
            yield shard(inputs, cp, cp_rank), shard(labels, cp, cp_rank), slots[positions]

    def forward_step(source: Iterator[tuple[Tensor, Tensor, Tensor]], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        enter("evaluating")
        tokens, labels, slots = (part.to(device.device()) for part in next(source))
        outputs = chunk(input_ids=tokens[None], position_ids=None, attention_mask=starts, labels=labels[None])
        return outputs, partial(_add, labels=labels, slots=slots, total=total)

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=micro_batches(),
        model=list(model),
        num_microbatches=rounds,
        seq_length=padded,
        micro_batch_size=1,
        forward_only=True,
    )


def _add(outputs: Tensor, *, labels: Tensor, slots: Tensor, total: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, best = outputs[0, 0].double(), outputs[1, 0].double()
    at = slots != NOWHERE
    hits = (best == labels).double()
    total.index_add_(0, slots[at], torch.stack((loss, hits, torch.ones_like(loss), best), dim=1)[at])
    return loss.sum(), at.sum().to(torch.int), {}
