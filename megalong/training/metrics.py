"""Where do a run's numbers go? metrics.jsonl, TensorBoard and one console line per step, all from rank 0.

Throughput is tokens per second per device over whole steps, data loading included. MFU counts model FLOPs
(causal half of attention, no recompute), HFU what is executed; both are shares of the cluster's dense bf16 peak.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megalong.config.schema import Config
from megalong.planning.flops import hardware_flops_per_step, model_flops_per_step
from megalong.recipe.layout import layout_of
from megalong.runtime import device
from megalong.runtime.console import say
from megalong.runtime.files import write_text

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Utilisation:
    """Throughput of one step."""

    tokens_per_second_per_gpu: float
    mfu: float
    hfu: float


def utilisation(config: Config, seconds: float) -> Utilisation:
    """Throughput and utilisation of a step that took `seconds`."""
    batch = config.train.global_batch_size or 1
    ranks = layout_of(config).world_size
    peak = config.cluster.peak_flops(config.precision) * ranks * seconds
    seq = config.stage.seq_length
    return Utilisation(
        batch * seq / seconds / ranks,
        model_flops_per_step(config.model, seq, batch) / peak,
        hardware_flops_per_step(config.model, seq, batch, config.train.recompute) / peak,
    )


class Metrics:
    """Writes one record per step; on other ranks than 0 it does nothing.

    Args:
        run_dir: receives metrics.jsonl and tensorboard/.
        step: steps already done; later lines of an earlier attempt are dropped, so every step stands there once.
    """

    def __init__(self, run_dir: Path, config: Config, step: int, first: bool) -> None:
        self.config = config
        self.total = config.train.steps or 0
        self._file = self._board = None
        self._started, self._begun_at = time.monotonic(), step
        if first:
            path = run_dir / METRICS
            _keep_steps(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def step(self, record: dict[str, Any], seconds: float) -> None:
        """Record one finished step: a dict with at least step, loss, grad_norm, lr, tokens."""
        use = utilisation(self.config, seconds)
        memory = device.peak_memory_bytes()
        record = {
            **record,
            "tokens_per_second_per_gpu": use.tokens_per_second_per_gpu,
            "mfu": use.mfu,
            "hfu": use.hfu,
            "seconds": seconds,
            "peak_memory_bytes": memory,
        }
        if self._file is None or self._board is None:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        for name in ("loss", "grad_norm", "lr", "tokens_per_second_per_gpu", "mfu", "hfu", "seconds"):
            self._board.add_scalar(f"train/{name}", record[name], step)
        self._board.add_scalar("train/peak_memory_GiB", memory / 2**30, step)
        self._board.flush()
        done = step - self._begun_at
        left = (time.monotonic() - self._started) / done * (self.total - step) if done else 0.0
        say(
            f"step {step:>{len(str(self.total))}}/{self.total} | loss {record['loss']:.4f} | "
            f"grad norm {record['grad_norm']:.3f} | lr {record['lr']:.2e} | "
            f"{use.tokens_per_second_per_gpu:,.0f} tokens/s/GPU | MFU {use.mfu:.1%} HFU {use.hfu:.1%} | "
            f"{seconds:.2f} s | ETA {_clock(left)}"
        )

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """TensorBoard scalars that do not belong to a training step (evaluation, checkpoints)."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{prefix}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _keep_steps(path: Path, last: int) -> None:
    if path.is_file():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= last:
                    lines.append(line)
            except (ValueError, KeyError):
                break  # a line cut by a kill: everything after it belongs to steps that are done again
        write_text(path, "".join(line + "\n" for line in lines))


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
