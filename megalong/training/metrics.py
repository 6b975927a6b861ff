"""A run's numbers go to metrics.jsonl, TensorBoard and one console line per step, all from rank 0.

Throughput is tokens per second per device over whole steps, data loading included. MFU counts model FLOPs
(causal half of attention, no recompute), HFU what is executed; both are shares of the cluster's dense bf16 peak.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalong.evaluation.results import Moment, StageEvaluation
from megalong.planning.plan import utilisation
from megalong.planning.workload import workload_of
from megalong.run import Run
from megalong.runtime import device
from megalong.runtime.console import say, warn
from megalong.runtime.files import write_text
from megalong.runtime.json_file import parse
from megalong.runtime.live import clock
from megalong.training.board import Board
from megalong.training.curves import BY_WINDOW, accuracy_tag
from megalong.training.phases import shares
from megalong.training.records import METRICS, JsonLines
from megalong.training.steps import Done


class Metrics:
    """Writes one record per step; on other ranks than 0 it does nothing.

    Args:
        run: its run_dir receives metrics.jsonl and tensorboard/.
        step: steps already done; later lines of an earlier attempt are dropped, so every step stands there once.
        tokens: read by this stage so far.
        tokens_before: read by the stages before it.
    """

    def __init__(self, run: Run, step: int, first: bool, tokens: int = 0, tokens_before: int = 0) -> None:
        self.work, self.cluster, self.total = workload_of(run), run.config.cluster, run.steps
        self.tokens_before = tokens_before
        self._run = run
        self._file: JsonLines | None = None
        self._board: Board | None = None
        self._started, self._begun_at = time.monotonic(), step
        if first:
            path = run.run_dir / METRICS
            try:
                _keep_steps(path, step)
            except OSError as error:
                warn(f"{path} cannot be rewritten ({error.strerror or error}): steps done again stand there twice.")
            self._file = JsonLines(path)
            self._board = Board(run, step, tokens_before + tokens)
            self._board.flush()

    def step(self, done: Done, *, tokens: int, skipped: int) -> None:
        """Record one finished step, and write whatever else was added for it.

        Args:
            tokens: read since the start of the stage.
            skipped: steps left out since then.
        """
        use = utilisation(self.work, self.cluster, done.seconds, done.window)
        memory, result, step, seconds = device.peak_memory_bytes(), done.result, done.step, done.seconds
        record: dict[str, Any] = {
            "step": step,
            "window": done.window,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": tokens,
            "valid_tokens": result.valid_tokens,
            "skipped_steps": skipped,
            **done.traffic,
            "phase_seconds": done.phases,
            "tokens_per_second_per_gpu": use.tokens_per_second_per_gpu,
            "mfu": use.mfu,
            "hfu": use.hfu,
            "seconds": seconds,
            "peak_memory_bytes": memory,
        }
        if self._file is None or self._board is None:
            return
        self._file.write(record)
        for name in ("loss", "grad_norm", "lr", "tokens_per_second_per_gpu", "mfu", "hfu", "seconds"):
            self._board.add(f"train/{name}", record[name], step)
        self._board.add("train/peak_memory_GiB", memory / 2**30, step)
        for name, part in done.phases.items():
            self._board.add(f"phases/{name}", part, step)
        self._board.add("train/window", done.window, step)
        if self.work.shorter:
            self._board.add(f"train/loss_window_{done.window}", result.loss, step)
        along = {name: record[name] for name in ("loss", "grad_norm", "lr")}
        self._board.add_by_tokens(along, self.tokens_before + tokens)
        self._board.flush()
        steps = step - self._begun_at
        left = (time.monotonic() - self._started) / steps * (self.total - step) if steps else 0.0
        say(
            f"step {step:>{len(str(self.total))}}/{self.total} | loss {result.loss:.4f} | "
            f"grad norm {result.grad_norm:.3f} | lr {result.lr:.2e} | "
            f"{use.tokens_per_second_per_gpu:,.0f} tokens/s/GPU | MFU {use.mfu:.1%} HFU {use.hfu:.1%} | "
            f"{seconds:.2f} s: {shares(done.phases)} | ETA {clock(left)}"
            + (f" | {done.window:,} tokens" if done.window != self._run.seq_length else "")
        )

    def scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """TensorBoard scalars beside those of a training step; `flush`, or the next step, writes them."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add(f"{prefix}/{name}", value, step)

    def evaluated(self, found: StageEvaluation, moment: Moment, when: str, tokens: int) -> None:
        """Record an evaluation.

        Args:
            found: all evaluations of the stage, `moment` among them.
            when: before, under_way or after.
            tokens: read since the start of the stage.
        """
        if self._board is None:
            return
        groups = ["evaluation"] + ([f"evaluation_{when}"] if when != "under_way" else [])
        windows = [w.seq_length for w in found.shorter]
        curves = [("", moment.position), *zip((f"{BY_WINDOW}{w}" for w in windows), moment.shorter, strict=True)]
        for group in groups:
            for suffix, curve in curves:
                if curve.last_quarter is not None:
                    self._board.add(f"{group}/last_quarter_loss{suffix}", curve.last_quarter, moment.step)
        if moment.position.last_quarter is not None:
            along = {"held_out_last_quarter": moment.position.last_quarter}
            self._board.add_by_tokens(along, self.tokens_before + tokens)
        if moment.asked.short_loss is not None:
            self._board.add("evaluation/short_loss", moment.asked.short_loss, moment.step)
        scores = moment.asked.named("", self._run.seq_length, self._run.theta)
        for task, accuracy in scores.accuracy.items():
            self._board.add(accuracy_tag(task), accuracy, moment.step)
        self._board.add_evaluation(self._run, found, moment, when)
        self._board.flush()

    def flush(self) -> None:
        """Write what was added."""
        if self._board is not None:
            self._board.flush()

    def finished(self, step: int) -> None:
        """Note that the stage was trained to its end."""
        if self._board is not None:
            self._board.finished(step)

    def close(self) -> None:
        """Finish the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _keep_steps(path: Path, last: int) -> None:
    """Leave one line per step up to `last`, as it is; what is no record of a step goes, whatever stands after it."""
    if not path.is_file():
        return
    kept: dict[int, str] = {}
    lines = path.read_bytes().splitlines()
    strange = []
    for number, line in enumerate(lines, 1):
        step = _step_of(line)
        if step is None:
            strange.append(number)
        elif step <= last:
            kept.pop(step, None)  # the later attempt's is the one that counts
            kept[step] = line.decode("utf-8")
    if strange and strange != [len(lines)]:  # a last line that a kill cut short is nothing strange
        warn(f"{path}: line {strange[0]} and {len(strange) - 1} more are no records of steps; they are left out.")
    write_text(path, "".join(line + "\n" for line in kept.values()))


def _step_of(line: bytes) -> int | None:
    try:
        record = parse(line, allow_nan=True)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None
