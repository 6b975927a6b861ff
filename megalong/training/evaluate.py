"""What a run finds out about its model: loss by position, answers to questions, loss on short texts.

At the start of a stage, at the end and every `evaluation.every_steps`, in the layout of training, by forward passes
alone: nothing that training reads or changes is another afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist

from megalong.data.windows import Windows
from megalong.evaluation.documents import short_samples
from megalong.evaluation.evaluate import Material, evaluate_model
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.results import Asked, Moment, StageEvaluation, WindowEvaluation, read_evaluation
from megalong.evaluation.score import score
from megalong.rope.frequencies import rotary_frequencies
from megalong.run import Run
from megalong.runtime.console import say, warn
from megalong.runtime.errors import DataError
from megalong.runtime.watchdog import enter
from megalong.training.held_out import evaluate
from megalong.training.metrics import Metrics
from megalong.training.questions import draw
from megalong.training.state import State

When = Literal["before", "under_way", "after"]


class _AskedToStop(Exception):
    """On every rank at once: what has been measured so far is no evaluation."""


class Evaluations:
    """The evaluations of one run; every rank makes one and calls the same of it.

    Args:
        held_out: None: the run is not evaluated.
        stop: whether any rank has been asked to stop; every rank calls it, and it says the same on all.
    """

    def __init__(
        self, run: Run, state: State, held_out: Windows | None, metrics: Metrics, stop: Callable[[], bool]
    ) -> None:
        self.run, self.state, self.metrics, self.stop = run, state, metrics, stop
        self.held_out = held_out
        self.material = draw(run, state.carried, held_out) if held_out is not None else None

    def before(self) -> None:
        """Evaluate the weights that the stage starts from, unless that has been done."""
        found = self.state.evaluation
        if found is not None and found.after is not None:  # a finished stage is made longer
            shorter = [replace(w, after=None) for w in found.shorter]
            self._keep(replace(found, after=None, asked_after=None, shorter=shorter))
        if found is None and (moment := self._look("before the stage")) is not None:
            assert self.held_out is not None
            others = [part.window for part in self.held_out.parts[1:]]
            curves = zip(others, moment.shorter, strict=True)
            shorter = [WindowEvaluation(window, curve, None) for window, curve in curves]
            start = self._short_loss_under_its_own_theta()
            evaluation = StageEvaluation(self.run.seq_length, moment.position, None, shorter, moment.asked)
            self._keep(replace(evaluation, short_loss_start=start), moment, "before")

    @property
    def due(self) -> bool:
        """Whether this step is one of those under way at which the run is evaluated, and that has not been done."""
        every, step, found = self.run.config.evaluation.every_steps, self.state.step, self.state.evaluation
        if not every or found is None or self.held_out is None:
            return False
        return 0 < step < self.run.steps and step % every == 0 and all(m.step != step for m in found.under_way)

    def under_way(self) -> None:
        """Evaluate the step just done."""
        found = self.state.evaluation
        assert found is not None
        if (moment := self._look(f"after step {self.state.step} of {self.run.steps}")) is not None:
            done = sorted([*found.under_way, moment], key=lambda m: m.step)
            self._keep(replace(found, under_way=done), moment, "under_way")

    def after(self) -> bool:
        """Evaluate the trained stage, unless that has been done; False if the run was asked to stop instead."""
        found = self.state.evaluation
        if found is None or found.after is not None or self.held_out is None:
            return True
        moment = self._look("after the stage")
        if moment is None:
            return False
        shorter = [replace(w, after=c) for w, c in zip(found.shorter, moment.shorter, strict=True)]
        found = replace(found, after=moment.position, asked_after=moment.asked, shorter=shorter)
        self._keep(found, moment, "after")
        return True

    def _look(self, name: str) -> Moment | None:
        """Measure everything; None if there is nothing to be measured, or the run was asked to stop."""
        if self.held_out is None or self.material is None:
            return None
        enter("evaluating")
        try:
            curves = {}
            for part in self.held_out.parts:
                self._go_on()
                curves[part.window] = evaluate(self.run, self.state.model, part)
            self._go_on()
            found, _ = evaluate_model(self.run, self.state.model, self.material, name, progress=self._go_on)
        except _AskedToStop:
            return None
        asked = Asked(found.cells, found.short_loss)
        for line in _told(name, self.run.seq_length, curves, asked, self.material):
            say(line)
        main, *others = curves.values()
        return Moment(self.state.step, main, others, asked)

    def _go_on(self, tokens: int = 0) -> None:
        if self.stop():
            raise _AskedToStop

    def _short_loss_under_its_own_theta(self) -> float | None:
        """Of the starting weights as they were before this stage; None where a rope scaling's attention factor, which
        the model is built with, was another."""
        run, before = self.run, self.run.before
        assert self.material is not None
        own = replace(run, theta=before.theta, seq_length=before.window, rope_scaling=run.rope_scaling_before)
        if not self.material.short or _attention_factor(own) != _attention_factor(run):
            return None
        return score(own, self.state.model, short_samples(self.material.short), 1)[0].mean_loss

    def _keep(self, evaluation: StageEvaluation, moment: Moment | None = None, when: When = "before") -> None:
        """Into the state, evaluation.json and TensorBoard."""
        if self.material is not None:
            evaluation = replace(evaluation, base_window=self.material.base_window)
        self.state.evaluation = evaluation
        try:
            if dist.get_rank() == 0:
                evaluation.write(self.run.run_dir)
        except OSError as error:  # it is in the checkpoint too
            warn(f"evaluation.json cannot be written in {self.run.run_dir}: {error.strerror or error}.")
        if moment is not None:
            tokens = self.state.cursor.consumed_samples * self.run.seq_length
            self.metrics.evaluated(evaluation, moment, when, tokens)


def lacks_its_end(run: Run, state: State, held_out: Windows | None) -> bool:
    """Whether a stage that is trained to its end was stopped before it was evaluated there; every rank calls this."""
    found = state.evaluation
    if held_out is None or found is None or found.after is not None or state.step < run.steps:
        return False
    missing = [True]
    if dist.get_rank() == 0:
        # the last checkpoint may have been written before it, and does not know of it then
        with suppress(DataError):
            missing = [read_evaluation(run.run_dir).after is None]
    dist.broadcast_object_list(missing, 0)
    return missing[0]


def _attention_factor(run: Run) -> float:
    window = run.seq_length
    arguments: dict[str, Any] = {"max_position_embeddings": window, "sequence_length": window}
    return rotary_frequencies(run.theta, run.model.head_dim, run.rope_scaling, **arguments)[1]


def _told(name: str, seq_length: int, curves: dict[int, LossByPosition], asked: Asked, material: Material) -> list[str]:
    """What is said of an evaluation."""
    lines = []
    for window, curve in curves.items():
        loss = "has no token that counts" if curve.last_quarter is None else f"{curve.last_quarter:.4f}"
        which = "the window" if window == seq_length else f"{window:,} tokens"
        lines.append(f"{name}: loss on the last quarter of {which} {loss}")
    parts = []
    for task, length in dict.fromkeys((c.task, c.length) for c in asked.cells):
        own = [c for c in asked.cells if (c.task, c.length) == (task, length)]
        right = sum(round(c.exact * c.samples) for c in own)
        parts.append(f"{task} {right}/{sum(c.samples for c in own)} at {length:,}")
    if asked.short_loss is not None:
        parts.append(f"loss on texts of {material.base_window:,} tokens {asked.short_loss:.4f}")
    return [*lines, *([f"{name}: {', '.join(parts)}"] if parts else [])]
