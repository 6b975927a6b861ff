"""Runs real training steps on pool ranks and reports what they moved and what they hold."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalong.config.schema import Config


@dataclass
class Observed:
    """What one rank saw."""

    sent: dict[tuple[str, str], int]
    """Bytes by (group, kind) of one step."""
    weights: int
    """Bytes of the buffer that holds the parameters."""
    gradients: int
    """Bytes of the main gradients."""
    optimizer: int
    """Bytes of master weights and moments."""
    parameters: dict[str, tuple[int, ...]]
    """Name to shape."""


class Trainer:
    """The real trainer's parts on this rank, fed with random tokens."""

    def __init__(self, overrides: list[str]) -> None:
        from megalong.model.gpt import build
        from megalong.recipe.compose import compose
        from megalong.recipe.layout import layout_of
        from megalong.topology.groups import initialize
        from megalong.training.step import build_optimizer

        self.config = compose(overrides, dist.get_world_size())
        self.layout = layout_of(self.config)
        initialize(self.layout, self.config.attention.hierarchical_context_parallel_sizes)
        self.model = build(self.config)
        self.optimizer = build_optimizer(self.config, self.model)
        self.steps = itertools.count()

    def batches(self) -> Any:
        config: Config = self.config
        local = config.stage.seq_length // self.layout.cp
        tokens = torch.randint(0, config.model.vocab_size, (1, local))
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, local), "document_starts": None}
        return itertools.repeat(batch)

    def step(self) -> None:
        from megalong.training.step import train_step

        train_step(self.config, self.model, self.optimizer, self.batches(), next(self.steps))

    def optimizer_bytes(self) -> int:
        total = 0
        for one in self.optimizer.chained_optimizers:
            total += sum(_bytes(p) for group in one.shard_fp32_from_float16_groups for p in group)
            for state in one.optimizer.state.values():
                total += sum(_bytes(t) for name, t in state.items() if name.startswith("exp_avg"))
        return total


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def observe(overrides: list[str]) -> Observed:
    """One counted step after a warm-up step."""
    from megalong.planning.observe import TrafficCounter

    trainer = Trainer(overrides)
    trainer.step()
    with TrafficCounter(trainer.layout) as counter:
        trainer.step()
    buffers = trainer.model[0].buffers
    return Observed(
        sent=dict(counter.sent),
        weights=sum(_bytes(b.param_data) for b in buffers),
        gradients=sum(_bytes(b.grad_data) for b in buffers),
        optimizer=trainer.optimizer_bytes(),
        parameters={
            name.removeprefix("module.").removeprefix("module."): tuple(p.shape)
            for name, p in trainer.model[0].named_parameters()
        },
    )


@dataclass
class Memory:
    """What torch's allocator saw on one rank, bytes above what was there before forward and backward."""

    saved: int
    """Kept between one forward pass and its backward pass."""
    peak: int
    """Highest at any time of forward and backward of a whole step."""
    events: list[tuple[int, int]]


def _allocations(prof: Any) -> list[tuple[int, int]]:
    """(time in ns, bytes) of every allocation (positive) and release (negative), in order."""
    found = [(e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sorted(found, key=lambda e: e[0])


def _highest(events: list[tuple[int, int]]) -> int:
    return max(itertools.accumulate((size for _, size in events), initial=0))


@contextmanager
def patient_waits(seconds: float = 0.002) -> Iterator[None]:
    """Give gloo's threads time to let go of their tensors after each collective, as they do on an idle machine.

    A thread drops its reference only after it has woken the waiting rank: whether it still holds the tensor when the
    rank allocates the next one is otherwise chance.
    """
    wait = dist.Work.wait

    def patient(work: dist.Work, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(seconds)
        return done

    dist.Work.wait = patient  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def measure_memory(overrides: list[str], keep_events: bool = False) -> Memory:
    """Profile forward and backward of real steps, after a warm-up step; the lowest of three peaks counts."""
    from torch.profiler import ProfilerActivity, profile

    from megalong.training.step import forward_backward

    trainer = Trainer(overrides)
    config, layout = trainer.config, trainer.layout
    trainer.step()
    settings: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    saved = 0
    if layout.pp == 1:
        batch = next(trainer.batches())
        with patient_waits(), profile(**settings) as prof:
            losses = trainer.model[0](
                input_ids=batch["tokens"], position_ids=None, attention_mask=None, labels=batch["labels"]
            )
        saved = sum(size for _, size in _allocations(prof))
        losses.sum().backward()
        del losses
    micro_batches = (config.train.global_batch_size or 1) // layout.dp
    peaks, events = [], []
    for _ in range(3):
        with patient_waits(), profile(**settings) as prof:
            forward_backward(config, trainer.model, trainer.batches(), micro_batches)
        events = _allocations(prof)
        peaks.append(_highest(events))
    return Memory(saved, min(peaks), events if keep_events else [])
