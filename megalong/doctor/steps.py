"""Real optimizer steps on this rank, with random tokens: how long they take, and what they allocate.

The parts are the trainer's own; only reading, saving and logging are left out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megalong.run import Run


class Trainer:
    """The real trainer's parts on this rank, fed with random tokens.

    Args:
        overrides: of the run.
        run: what they resolve to, where it is there already.
    """

    def __init__(self, overrides: list[str], run: Run | None = None) -> None:
        from megalong.doctor.ranks import run_on_ranks
        from megalong.model.gpt import build
        from megalong.topology.groups import initialize
        from megalong.training.step import build_optimizer

        self.run = run_on_ranks(overrides) if run is None else run
        self.config, self.layout = self.run.config, self.run.layout
        initialize(self.layout, self.config.attention.hierarchical_context_parallel_sizes)
        self.model = build(self.run)
        self.optimizer = build_optimizer(self.run, self.model)
        self.steps = itertools.count()

    def batches(self) -> Any:
        local = self.run.seq_length // self.layout.cp
        tokens = torch.randint(0, self.run.model.vocab_size, (1, local))
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, local), "document_starts": None}
        return itertools.repeat(batch)

    def step(self) -> None:
        from megalong.training.schedule import scheduler
        from megalong.training.step import train_step

        schedule = scheduler(self.run, self.optimizer)
        train_step(self.run, self.model, self.optimizer, schedule, self.batches(), next(self.steps))

    def optimizer_bytes(self) -> int:
        total = 0
        for one in self.optimizer.chained_optimizers:
            total += sum(tensor_bytes(p) for group in one.shard_fp32_from_float16_groups for p in group)
            for state in one.optimizer.state.values():
                total += sum(tensor_bytes(t) for name, t in state.items() if name.startswith("exp_avg"))
        return total


def tensor_bytes(x: torch.Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return x.numel() * x.element_size()


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

    dist.Work.wait = patient  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def measure_memory(overrides: list[str], keep_events: bool = False) -> Memory:
    """Profile forward and backward of real steps, after a warm-up step; the lowest of three peaks counts."""
    from torch.profiler import ProfilerActivity, profile

    from megalong.training.forward import forward_backward

    trainer = Trainer(overrides)
    run = trainer.run
    trainer.step()
    settings: Any = {"activities": [ProfilerActivity.CPU], "profile_memory": True}
    saved = 0
    if run.layout.pp == 1:
        batch = next(trainer.batches())
        with patient_waits(), profile(**settings) as prof:
            losses = trainer.model[0](
                input_ids=batch["tokens"], position_ids=None, attention_mask=None, labels=batch["labels"]
            )
        saved = sum(size for _, size in _allocations(prof))
        losses.sum().backward()
        del losses
    peaks, events = [], []
    for _ in range(3):
        with patient_waits(), profile(**settings) as prof:
            forward_backward(run.seq_length, trainer.model, trainer.batches(), run.micro_batches)
        events = _allocations(prof)
        peaks.append(_highest(events))
    return Memory(saved, min(peaks), events if keep_events else [])
