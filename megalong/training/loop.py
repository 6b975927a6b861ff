"""How is one stage run from its start to its last checkpoint?

Order: build, load or resume, canary, evaluate, train, save, evaluate. Everything the run writes lies in run_dir.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import torch.distributed as dist
from megatron.core import parallel_state

from megalong.attention import canary, meters
from megalong.checkpoint import pointer, store
from megalong.checkpoint.hf import load_hf_into
from megalong.checkpoint.info import HF_FILES, CheckpointInfo
from megalong.checkpoint.saving import Record
from megalong.config.schema import Config
from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import MicroBatch, training_batches
from megalong.data.order import shuffled_samples
from megalong.evaluation.results import StageEvaluation, evaluation_from
from megalong.model.gpt import attention_of, build
from megalong.model.llama import model_to_hf
from megalong.planning.beside import Beside
from megalong.planning.duration import checkpoint_bytes
from megalong.planning.plan import plan_of
from megalong.recipe.compose import to_yaml
from megalong.runtime import device
from megalong.runtime.console import say, warn
from megalong.runtime.errors import EXIT_OK, EXIT_SAVED_ON_SIGNAL, CheckpointError, ConfigError
from megalong.runtime.files import hold, write_text
from megalong.runtime.launch import together
from megalong.runtime.watchdog import enter
from megalong.training.agreement import Agreement, Stragglers, agree
from megalong.training.evaluate import evaluate
from megalong.training.finite import GradientWatch, NonFiniteError
from megalong.training.metrics import Metrics
from megalong.training.progress import require_progress
from megalong.training.saver import Saver
from megalong.training.signals import StopRequest
from megalong.training.spikes import LossWatch
from megalong.training.start import Start
from megalong.training.step import build_optimizer, train_step


class StageRun:
    """One stage on one layout; needs megatron's parallel state.

    Args:
        config: resolved configuration.
        start: where the weights come from.
        train: training sequences.
        held_out: sequences for the loss by position, or None.
        stop: notes signals since the start of the process; None: from now on.
    """

    def __init__(
        self,
        config: Config,
        start: Start,
        train: SequenceDataset,
        held_out: SequenceDataset | None,
        stop: StopRequest | None = None,
    ) -> None:
        self.stop = stop or StopRequest()
        assert config.run_dir is not None
        self.config, self.held_out, self.train_data = config, held_out, train
        self.run_dir = Path(config.run_dir)
        self.beside = Beside(plan_of(config), dist.get_rank())
        self.saver = Saver(self.run_dir / "checkpoints", config, checkpoint_bytes(self.beside.plan.work))
        self.first = dist.get_rank() == 0
        self.model = build(config)
        self.watch = GradientWatch(self.model)
        self.step = self.skipped = 0
        self.damaged: list[Path] = []
        self._lock: IO[str] | None = None
        self._stopwatch = meters.Stopwatch()
        self._losses = LossWatch()
        hosts: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(hosts, os.uname().nodename)
        self._stragglers = Stragglers(hosts)
        self.cursor = Cursor.at_start(train)
        self.evaluation: StageEvaluation | None = None
        self.carried_config = start.hf_config
        self._load(start)

    def _load(self, start: Start) -> None:
        enter("loading")
        if start.kind == "hf":
            assert start.path is not None
            path = start.path
            together(lambda: load_hf_into(self.model, path, self.config.model))
        elif start.kind == "megatron":
            assert start.path is not None
            folder = start.path
            together(lambda: store.verify_checksums(folder))
            store.load_weights(folder, self.model)
        elif start.kind == "resume":
            assert start.path is not None
            start = replace(start, path=self._sound(start.path))
        self.carried = start.path / HF_FILES if start.kind in ("megatron", "resume") and start.path else start.path
        # the optimizer copies the weights into its fp32 master weights: it is built once they are in place
        self.optimizer = build_optimizer(self.config, self.model)
        if start.kind == "resume":
            assert start.path is not None
            state = store.load_run(start.path, self.model, self.optimizer)
            self.step, self.skipped = state["step"], state["skipped"]
            self.saver.saved_step = self.step
            self.cursor = Cursor.from_state_dict(state["cursor"])
            if "data.path" in self.config.checkpoint.allow_changed:
                self.cursor = replace(self.cursor, fingerprint=self.train_data.fingerprint)
            self.evaluation = evaluation_from(state["evaluation"]) if state["evaluation"] else None

    def _sound(self, newest: Path) -> Path:
        """The newest checkpoint, from `newest` backwards, all of whose files are as they were written."""
        folder: Path | None = newest
        while folder is not None:
            try:
                together(partial(store.verify_checksums, folder))
                return folder
            except CheckpointError as error:
                before = pointer.older(self.saver.root, folder)
                if before is None:
                    raise
                warn(f"{error} Falling back to {before.name}; the damaged one is kept as {folder.name}.damaged.")
                self.damaged.append(folder)
                folder = before
        raise AssertionError

    def run(self) -> int:
        """Train to the last step, saving on the way.

        Returns:
            exit code: done, or stopped by a signal and saved.

        Raises:
            NonFiniteError: a loss or gradient was not finite and `train.non_finite=stop`.
        """
        config = self.config
        total = config.train.stop_after or config.train.steps or 0
        if self.step >= total:
            say(f"nothing left to do: step {self.step} of {total} is saved in {self.saver.root}")
            return EXIT_OK
        enter("canary")
        self._canary()
        together(self._claim)
        metrics = Metrics(self.run_dir, config, self.step, self.first)
        self._evaluate("before", metrics)
        say(self.beside.summary())
        batches = self._batches()
        while self.step < total:
            seconds = self._train_one(batches, metrics)
            word = agree(
                stop=self.stop.asked,
                save=self.saver.due(self.step),
                written=self.saver.written,
                kernel_seconds=seconds,
            )
            self._look_for_stragglers(word, metrics)
            if word.written:
                self.saver.commit(metrics)
            if word.stop:
                self._finish(metrics)
                say(f"stopped by a signal after step {self.step}; start again to go on")
                return EXIT_SAVED_ON_SIGNAL
            if word.save and self.step < total:
                self.saver.save(self.step, self.model, self.optimizer, self._record(), metrics)
        if self.step >= (config.train.steps or 0):
            self._evaluate("after", metrics)
        self._finish(metrics)
        return EXIT_OK

    def _finish(self, metrics: Metrics) -> None:
        self.saver.save(self.step, self.model, self.optimizer, self._record(), metrics, final=True)
        metrics.close()
        if self._lock is not None:
            self._lock.close()

    def _claim(self) -> None:
        """Two runs in one run_dir would overwrite each other's checkpoints."""
        self._lock = hold(self.run_dir) if self.first else None
        if not self.first:
            return
        if self._lock is None:
            raise ConfigError(
                f"run_dir={self.run_dir} is in use by another run. Wait for it, or choose another run_dir."
            )
        require_progress(self.run_dir, self.step)
        for folder in self.damaged:
            pointer.set_aside(folder, "damaged")
        for folder in pointer.whole_ones(self.saver.root):
            if (pointer.step_of(folder) or 0) > self.step:  # the pointer was set back by hand
                warn(f"{folder.name} is newer than what is resumed: kept as {folder.name}.superseded.")
                pointer.set_aside(folder, "superseded")
        write_text(self.run_dir / "config.yaml", to_yaml(self.config))

    def _batches(self) -> Iterator[MicroBatch]:
        config = self.config
        return training_batches(
            self.train_data,
            cursor=self.cursor,
            seed=config.seed,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=config.topology.dp or 1,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=config.topology.cp or 1,
            document_mask=config.attention.document_mask,
            loader=config.data.loader,
        )

    def _train_one(self, batches: Iterator[MicroBatch], metrics: Metrics) -> float:
        """One step; returns the seconds that this rank's attention kernels took."""
        config = self.config
        begun = time.monotonic()
        enter("training", self.step + 1)
        recording = meters.recording() if config.attention.meters else nullcontext()
        with self.beside.counting(), self._stopwatch.running(), recording as meter:
            result = train_step(config, self.model, self.optimizer, batches, self.step)
        if not result.updated:
            self._not_finite(result.loss, result.grad_norm)
        elif (above := self._losses.jump(result.loss)) is not None:
            what = f"step {self.step + 1}, loss {result.loss:.4f}, {above:.2f} nats above the steps before"
            warn(f"loss spike: {what}. {self._samples()}")
        self.step += 1
        self.cursor = self.cursor.advance(config.train.global_batch_size or 1)
        record = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": self.cursor.consumed_samples * config.stage.seq_length,
            "valid_tokens": result.valid_tokens,
            "skipped_steps": self.skipped,
            **(meter.summary() if meter else {}),
        }
        seconds = time.monotonic() - begun
        metrics.step(record, seconds)
        metrics.scalars("plan", self.beside.scalars(seconds, device.peak_memory_bytes()), self.step)
        return self._stopwatch.read()

    def _samples(self) -> str:
        """Which sequences the step under way trains on."""
        first, count = self.cursor.consumed_samples, self.config.train.global_batch_size or 1
        ids = shuffled_samples(
            sequences=len(self.train_data), seed=self.config.seed, consumed_samples=first, dp_rank=0, dp_size=1
        )
        named = ", ".join(str(i) for i in islice(ids, count))
        return f"Samples {first} to {first + count - 1} of the run: sequences {named} of {self.config.data.path}."

    def _look_for_stragglers(self, word: Agreement, metrics: Metrics) -> None:
        if self.config.attention.document_mask != "none":
            return  # ranks then have unequal work
        found = {"slowest_rank": float(word.slowest), "slowest_over_median": word.slowest_over_median}
        metrics.scalars("attention_kernels", found, self.step)
        sentence = self._stragglers.look(word)
        if sentence is not None:
            warn(sentence)

    def _not_finite(self, loss: float, grad_norm: float) -> None:
        ranks = self.watch.culprits()
        what = (
            f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}; not finite on rank "
            f"{', '.join(map(str, ranks)) or '(none alone)'}. {self._samples()}"
        )
        if self.config.train.non_finite == "stop":
            raise NonFiniteError(f"{what} Nothing of this step was kept; the last checkpoint is good.")
        self.skipped += 1
        warn(f"{what} The step is left out ({self.skipped} so far).")

    def _canary(self) -> None:
        core = attention_of(self.model)
        if core is not None:
            canary.check(core, parallel_state.get_context_parallel_rank(), device.device())
            cp = self.config.topology.cp or 1
            if cp > 1:
                say(f"canary: information crosses all {cp} context-parallel ranks and nothing leaks")

    def _record(self) -> Record:
        return Record(
            state={
                "cursor": self.cursor.state_dict(),
                "skipped": self.skipped,
                "evaluation": asdict(self.evaluation) if self.evaluation else None,
            },
            info=self._info(),
            config_yaml=to_yaml(self.config),
            carried=self.carried,
        )

    def _info(self) -> CheckpointInfo:
        stage = self.config.stage
        assert stage.theta is not None
        dtype = "bfloat16" if self.config.precision == "bf16" else "float32"
        hf_config = model_to_hf(
            self.config.model, theta=stage.theta, window=stage.seq_length, dtype=dtype, carried=self.carried_config
        )
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # of the checkpoint, not of conf/model
            if token in (self.carried_config or {}):
                hf_config[token] = (self.carried_config or {})[token]
        return CheckpointInfo(
            hf_config=hf_config,
            stage=stage.name,
            seq_length=stage.seq_length,
            theta=stage.theta,
            step=self.step,
            consumed_samples=self.cursor.consumed_samples,
        )

    def _evaluate(self, when: str, metrics: Metrics) -> None:
        done = self.evaluation is not None and (when == "before" or self.evaluation.after is not None)
        if self.held_out is None or done:
            return
        enter("evaluating")
        found = evaluate(self.config, self.model, self.held_out)
        if self.evaluation is None:
            self.evaluation = StageEvaluation(self.config.stage.seq_length, before=found, after=None)
        else:
            self.evaluation = replace(self.evaluation, after=found)
        metrics.scalars(f"evaluation_{when}", {"last_quarter_loss": found.last_quarter or 0.0}, self.step)
        say(f"{when} the stage: loss on the last quarter of the window {found.last_quarter:.4f}")
        if self.first:
            self.evaluation.write(self.run_dir)
