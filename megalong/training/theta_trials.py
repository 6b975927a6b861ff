"""One theta tried out on the layout of a stage: train some steps from the stage's weights, then measure.

Nothing is saved: a trial is short, and a search that was killed repeats only the one it was in.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from megatron.core.distributed import DistributedDataParallel

from megalong.data.dataset import SequenceDataset
from megalong.evaluation.documents import short_samples
from megalong.evaluation.haystack import read_haystack
from megalong.evaluation.score import score
from megalong.evaluation.suite import Grid, Suite, make_suite, results
from megalong.evaluation.theta_search import Budget, Scores
from megalong.evaluation.tokens import PromptTokenizer
from megalong.run import Run
from megalong.runtime.console import say
from megalong.runtime.errors import DataError
from megalong.training.held_out import evaluate
from megalong.training.sequences import Sequences
from megalong.training.start import Start
from megalong.training.state import load_state
from megalong.training.steps import steps


class Trials:
    """Trains and measures; needs megatron's parallel state, and every rank calls the same.

    Args:
        run: the stage, whose theta is what is searched for.
        start: the weights that it starts from.
        data: its sequences; held-out ones are needed.
    """

    def __init__(self, run: Run, start: Start, data: Sequences) -> None:
        assert data.held_out is not None
        self.run, self.start, self.train, self.held_out = run, start, data.train, data.held_out.parts[0]
        self.short = _short_texts(self.held_out.dataset, run)
        self.suite = _questions(run, start)

    def budget(self, tokens: int) -> Budget:
        """What trials cost."""
        look = self.run.config.data.eval_sequences * self.run.seq_length + sum(len(s) for s in self.short)
        asked = sum(len(s.tokens) for s in self.suite.samples) if self.suite else 0
        return Budget(tokens, self.run.global_batch_size * self.run.seq_length, look, asked)

    def own_short_loss(self) -> float:
        """Short loss of the starting weights under their own theta."""
        return self._looked_at(self.run.before.theta, needles=False).short

    def __call__(self, theta: float, count: int, seed: int, needles: bool) -> Scores:
        """Scores after `count` steps."""
        if count == 0:
            return self._looked_at(theta, needles)
        run = _with_theta(self.run, theta)
        run = replace(run, steps=count, stop_after=count, config=replace(run.config, seed=seed))
        state = load_state(run, self.start, self.train)
        for done in steps(run, state, self.train, nullcontext):
            say(f"  theta {theta:,.0f} seed {seed} step {done.step}/{count} loss {done.result.loss:.4f}")
        return self._measure(run, state.model, needles)

    def _looked_at(self, theta: float, needles: bool) -> Scores:
        run = _with_theta(self.run, theta)
        return self._measure(run, load_state(run, self.start, self.train).model, needles)

    def _measure(self, run: Run, model: list[DistributedDataParallel], needles: bool) -> Scores:
        position = evaluate(run, model, self.held_out)
        if position.last_quarter is None:
            raise DataError(
                f"{self.held_out.dataset.folder}: no held-out sequence reaches the last quarter of the window."
            )
        (short,) = score(run, model, short_samples(self.short), 1)
        needle = None
        if needles and self.suite is not None:
            cells = results(self.suite, score(run, model, self.suite.samples, self.suite.slots))
            needle = sum(c.accuracy for c in cells) / len(cells)
        return Scores(position.last_quarter, short.mean_loss, needle, tuple(position.loss))


def _with_theta(run: Run, theta: float) -> Run:
    stage = replace(run.config.stage, theta=theta, theta_law="fixed")
    return replace(run, theta=theta, config=replace(run.config, stage=stage))


def _short_texts(data: SequenceDataset, run: Run) -> list[torch.Tensor]:
    """The first base window of held-out sequences."""
    window = min(run.model.max_position_embeddings, run.seq_length)
    count = min(len(data), max(1, run.config.data.eval_sequences))
    found = []
    for i in range(count):
        tokens = min(window + 1, data.valid_length(i * len(data) // count))
        if tokens > 1:
            found.append(torch.from_numpy(data.read(i * len(data) // count, 0, tokens)).long())
    return found


def _questions(run: Run, start: Start) -> Suite | None:
    """Needles at the window, a half and a quarter of it; None where none can be asked."""
    if start.carried is None:
        return None
    left_out: list[str] = []
    try:
        tokenizer = PromptTokenizer(start.carried)
        lengths = tuple(run.seq_length // n for n in (4, 2, 1) if run.seq_length // n > 1)
        grid = Grid(("needle",), lengths, (0.1, 0.4, 0.7, 1.0), samples=2)
        suite = make_suite(grid, tokenizer, read_haystack(None, tokenizer), left_out)
    except DataError as error:
        say(f"no needles: {error} Thetas are told apart by loss alone.")
        return None
    for line in left_out:
        say(f"left out: {line}")
    return suite if suite.cells else None
