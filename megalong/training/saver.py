"""When is the run saved, and what if that fails? By steps, by minutes, and at the end, beside the training on CUDA."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megalong.checkpoint import pointer
from megalong.checkpoint.save import Contents, Saving
from megalong.run import Run
from megalong.runtime import device
from megalong.runtime.console import say, warn
from megalong.runtime.errors import CheckpointError
from megalong.runtime.watchdog import enter
from megalong.training.metrics import Metrics
from megalong.training.state import State


class Saver:
    """Writes checkpoints of one run and removes the oldest; at most one is under way.

    Args:
        checkpoint_bytes: what one takes, at most.
        saved_step: the step that the run resumes from; 0: none is saved.
    """

    def __init__(self, run: Run, checkpoint_bytes: int, saved_step: int = 0) -> None:
        self.root, self.settings = run.run_dir / "checkpoints", run.config.checkpoint
        self.checkpoint_bytes = checkpoint_bytes
        self.stage_end = pointer.folder_of(self.root, run.steps)
        self.first = dist.get_rank() == 0
        self.saved_step = saved_step
        wish = self.settings.asynchronous
        self.beside = device.on_cuda() if wish is None else wish
        self._saving: Saving | None = None
        self._blocked = 0.0
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this rank wants `step` saved; only the first looks at the clock."""
        every, minutes = self.settings.save_steps, self.settings.save_minutes
        if every and step % every == 0:
            return True
        return bool(minutes) and self.first and time.monotonic() - self._last >= minutes * 60

    @property
    def written(self) -> bool:
        """Whether nothing is being written by this rank."""
        return self._saving is None or self._saving.written

    def save(
        self,
        state: State,
        record: Contents,
        metrics: Metrics,
        final: bool = False,
    ) -> None:
        """Write a checkpoint of the state, unless that has been done; every rank calls this.

        Args:
            final: the last of this process: it is whole when this returns. Any other that cannot be written (a full
                disk) is a warning, and the next is tried when it is due.

        Raises:
            CheckpointError: the final one cannot be written.
        """
        self.commit(metrics, final)
        if self.saved_step == state.step:
            return
        enter("saving")
        self._last = time.monotonic()
        beside = self.beside and not final
        with self._tolerated(final):
            self._saving = Saving(
                self.root,
                state.step,
                state.model,
                state.optimizer,
                record,
                expected_bytes=self.checkpoint_bytes,
                beside=beside,
            )
        self._blocked = time.monotonic() - self._last
        if not beside:
            self.commit(metrics, final)

    def commit(self, metrics: Metrics, final: bool = False) -> None:
        """Finish the save under way, if any, and remove the oldest checkpoints; every rank calls this."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        enter("committing")
        begun = time.monotonic()
        with self._tolerated(final):
            size = saving.commit()
            self.saved_step = saving.step
            if self.first:
                pointer.prune(self.root, max(1, self.settings.keep), self.stage_end)
                now = time.monotonic()
                found = {
                    "seconds": now - saving.begun,
                    "blocked_seconds": self._blocked + now - begun,
                    "GiB": size / 2**30,
                }
                metrics.scalars("checkpoint", found, saving.step)
                metrics.flush()
                waited = f", training waited {found['blocked_seconds']:.1f} s" if saving.beside else ""
                say(f"saved {saving.target}: {size / 2**20:,.1f} MiB in {found['seconds']:.1f} s{waited}")

    @contextmanager
    def _tolerated(self, final: bool) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            if final:
                raise
            warn(f"{error} Training goes on; the next save is tried when it is due.")
