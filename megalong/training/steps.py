"""The optimizer steps of a run as a generator: each one done, counted and timed before it is handed out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalong.attention import meters
from megalong.data.windows import Windows
from megalong.run import Run
from megalong.runtime.watchdog import enter
from megalong.training.phases import Phases
from megalong.training.profiles import profiling
from megalong.training.schedule import scheduler
from megalong.training.sequences import batches_from, named_samples
from megalong.training.state import State
from megalong.training.step import StepResult, train_step


@dataclass(frozen=True)
class Done:
    """One finished step."""

    step: int
    """Counted from 1."""
    result: StepResult
    samples: Callable[[], str]
    """Which sequences it trained on."""
    seconds: float
    """All of it, reading data included."""
    phases: dict[str, float]
    """Seconds of it by phase, on this rank: `phases.PHASES`."""
    traffic: dict[str, Any]
    """What the meters of attention's collectives found, if they were on."""
    window: int
    """Tokens of each of the sequences that it read."""


def steps(run: Run, state: State, train: Windows, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[Done]:
    """Train from where the state is to `run.stop_after`; the state is that after the step which was handed out.

    Args:
        around: makes the context in which each step runs.
    """
    phases = Phases()
    schedule = scheduler(run, state.optimizer)
    batches = batches_from(run, train, state.cursor, state.step)
    while state.step < run.stop_after:
        begun = time.monotonic()
        enter("training", state.step + 1)
        recording = meters.recording() if run.config.attention.meters else nullcontext()
        with around(), profiling(run, state.step + 1), phases.running(), recording as meter:
            result = train_step(run, state.model, state.optimizer, schedule, batches, state.step)
        samples = partial(named_samples, run, train, state.cursor, state.step)
        part = train.part_of(state.step)
        state.step += 1
        state.skipped += not result.updated
        state.cursor = state.cursor.advance(run.global_batch_size, part)
        seconds = time.monotonic() - begun
        window = train.parts[part].window
        traffic = meter.summary() if meter else {}
        yield Done(state.step, result, samples, seconds, phases.read(seconds), traffic, window)
