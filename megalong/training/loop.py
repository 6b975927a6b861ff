"""One stage from its start to its last checkpoint: canary, evaluate, train, evaluate and save on the way, evaluate.

Everything the run writes lies in run_dir.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megalong.planning.duration import checkpoint_bytes
from megalong.planning.plan import Plan
from megalong.run import Run
from megalong.runtime import live
from megalong.runtime.console import say
from megalong.runtime.errors import EXIT_OK, EXIT_SAVED_ON_SIGNAL
from megalong.runtime.launch import together
from megalong.runtime.watchdog import enter
from megalong.training.agreement import Agreement, agree
from megalong.training.beside import Beside
from megalong.training.canary import run_canary
from megalong.training.claim import RunClaim
from megalong.training.evaluate import Evaluations, lacks_its_end
from megalong.training.finite import ADVICE, NonFiniteError
from megalong.training.metrics import Metrics
from megalong.training.phases import ATTENTION
from megalong.training.progress import note_stop
from megalong.training.run_folder import begin
from megalong.training.saver import Saver
from megalong.training.sequences import Sequences
from megalong.training.signals import StopRequest
from megalong.training.start import Start
from megalong.training.state import contents_of, load_state
from megalong.training.steps import steps
from megalong.training.watchers import watchers


class StageRun:
    """One stage on one layout; needs megatron's parallel state.

    Args:
        run: what is trained.
        plan: its cost.
        start: where the weights come from.
        data: what it reads.
        stop: notes signals since the start of the process; None: from now on.
        claim: the first rank's claim on run_dir; None: taken here.
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        start: Start,
        data: Sequences,
        stop: StopRequest | None = None,
        claim: RunClaim | None = None,
    ) -> None:
        self.settings, self.data, self.stop = run, data, stop or StopRequest()
        self.first = dist.get_rank() == 0
        self.claim = together(lambda: claim or RunClaim(run.run_dir) if self.first else None)
        self.beside = Beside(plan, dist.get_rank())
        with self._withdrawing():
            self.state = load_state(run, start, data.train)
        self.saver = Saver(run, checkpoint_bytes(plan.work), self.state.step)

    def run(self) -> int:
        """Train to the last step, saving on the way.

        Returns:
            exit code: done, or stopped by a signal and saved.

        Raises:
            NonFiniteError: a loss or gradient was not finite and `train.non_finite=stop`, or too many were.
        """
        with self._withdrawing():
            return self._run()

    def _run(self) -> int:
        run, state = self.settings, self.state
        if state.step >= run.stop_after:
            return self._nothing_left()
        enter("canary")
        if run_canary(state.model) and run.layout.cp > 1:
            say(f"canary: information crosses all {run.layout.cp} context-parallel ranks and nothing leaks")
        together(lambda: begin(run, state) if self.first else None)
        metrics = self._metrics()
        if self._stop_asked():
            return self._stopped(metrics, "before its first step")
        evaluations = self._evaluations(metrics)
        evaluations.before()
        if evaluations.due:  # the run was stopped there
            evaluations.under_way()
        if self._stop_asked():
            return self._stopped(metrics, "before its first step")
        say(self.beside.summary())
        watching = watchers(run, state, self.beside)
        live.begin_stage(run.config.stage.name, state.step, run.steps)
        for done in steps(run, state, self.data.train, self.beside.counting):
            word = self._agree(done.phases[ATTENTION])
            for watcher in watching:
                metrics.scalars(watcher.prefix, watcher.look(done, word), done.step)
            metrics.step(done, tokens=state.cursor.consumed_samples * run.seq_length, skipped=state.skipped)
            if word.written:
                self.saver.commit(metrics)
            if word.stop:
                return self._stopped(metrics, f"after step {state.step}")
            if evaluations.due:
                evaluations.under_way()
                if self._stop_asked():
                    return self._stopped(metrics, f"after step {state.step}")
            if word.save and state.step < run.stop_after:
                self.saver.save(state, contents_of(state, run), metrics)
        if state.skipped >= state.step:
            raise NonFiniteError(
                f"none of the {state.step} steps of this stage changed the weights: every loss or gradient was not "
                f"finite. Nothing is saved as its end. {ADVICE}"
            )
        if state.step >= run.steps and not evaluations.after():
            return self._stopped(metrics, f"after step {state.step}, which was not evaluated")
        self._finish(metrics)
        return EXIT_OK

    def _nothing_left(self) -> int:
        """All steps are done and saved; what is left is at most an evaluation that a signal came before."""
        run, step = self.settings, self.state.step
        say(f"nothing left to do: step {step} of {run.stop_after} is saved in {self.saver.root}")
        if lacks_its_end(run, self.state, self.data.held_out):
            metrics = self._metrics()
            self._evaluations(metrics).after()
            metrics.close()
        return EXIT_OK

    def _metrics(self) -> Metrics:
        state = self.state
        tokens = state.cursor.consumed_samples * self.settings.seq_length
        return Metrics(self.settings, state.step, self.first, tokens, state.tokens_before)

    def _evaluations(self, metrics: Metrics) -> Evaluations:
        return Evaluations(self.settings, self.state, self.data.held_out, metrics, self._stop_asked)

    def _stop_asked(self) -> bool:
        return self._agree(0.0).stop

    def _agree(self, kernel_seconds: float) -> Agreement:
        return agree(
            stop=self.stop.asked,
            save=self.state.step > 0 and self.saver.due(self.state.step),
            written=self.saver.written,
            kernel_seconds=kernel_seconds,
        )

    def _stopped(self, metrics: Metrics, where: str) -> int:
        self._finish(metrics)
        if self.first:
            note_stop(self.settings.run_dir)
        say(f"stopped by a signal {where}; start again to go on")
        return EXIT_SAVED_ON_SIGNAL

    def _finish(self, metrics: Metrics) -> None:
        step = self.state.step
        try:
            if step > 0:
                self.saver.save(self.state, contents_of(self.state, self.settings), metrics, final=True)
            if step >= self.settings.steps:
                metrics.finished(step)
        finally:
            metrics.close()
        if self.claim is not None:
            self.claim.release()

    @contextmanager
    def _withdrawing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self.claim is not None:
                self.claim.withdraw()
            raise
