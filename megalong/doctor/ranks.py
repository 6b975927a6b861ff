"""Where do the doctor's parts run? On ranks of their own, so that a kernel that crashes takes its part with it alone.

On the CPU: a pool of forks with gloo. On GPUs: one process per GPU, started by torchrun, with NCCL; every task is a new
start, and what it prints lies in the output folder. `run_on_ranks` composes a run once for all ranks of a task.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megalong.run import Run
from megalong.runtime.errors import UserError
from megalong.runtime.ranks import RankFailed, RankPool


class Ranks:
    """Ranks of this machine.

    Args:
        device: cuda or cpu.
        count: GPUs, or CPU ranks.
        logs: folder for what ranks on GPUs print.
    """

    def __init__(self, device: str, count: int, logs: Path) -> None:
        self.device, self.count, self.logs = device, count, logs
        self._pool = RankPool()
        self._tasks = 0

    def run(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 300.0,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        """Run `fn(*args)` on `world_size` ranks of the machine's own device; results in rank order.

        Raises:
            RankFailed: a rank raised, died or hung.
        """
        if self.device == "cpu":
            return self.on_cpu(fn, world_size, *args, timeout_s=timeout_s)
        return self.started(fn, world_size, *args, timeout_s=timeout_s, env=env)

    def on_cpu(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
        """The same on CPU ranks, whatever the machine has."""
        with _without_gpus(), _printing_into(self.logs / "cpu-ranks.log"):
            return self._pool.run(fn, world_size, *args, timeout_s=timeout_s)

    def started(
        self,
        fn: Callable[..., Any],
        world_size: int,
        *args: Any,
        timeout_s: float = 300.0,
        env: dict[str, str] | None = None,
    ) -> list[Any]:
        """The same on processes that torchrun starts, one per GPU where there are any."""
        self._tasks += 1
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{self._tasks:02d}-{fn.__name__}.log"
        with tempfile.TemporaryDirectory(prefix="megalong-doctor-") as folder, log.open("w") as file:
            (Path(folder) / "task").write_bytes(pickle.dumps((fn, args)))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={world_size}", "-m", "megalong.doctor.rank", folder]
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (env or {}), start_new_session=True
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired as error:
                raise RankFailed(f"{fn.__name__} did not finish in {timeout_s:.0f} s: see {log}") from error
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
            paths = [Path(folder) / f"result-{rank}" for rank in range(world_size)]
            found = [(path.stat().st_mtime_ns, *pickle.loads(path.read_bytes())) for path in paths if path.exists()]
        results = [value for _, good, value in found if good]
        failed = [text for _, good, text in sorted(found, key=lambda f: f[0]) if not good]  # the first is the cause
        if failed or len(results) < world_size or code:
            raise RankFailed(failed[0] if failed else f"{fn.__name__} ended with exit code {code}: see {log}")
        return results

    def close(self) -> None:
        """End all ranks."""
        self._pool.close()


@contextlib.contextmanager
def _without_gpus() -> Iterator[None]:
    """Processes that begin in here see no GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


@contextlib.contextmanager
def _printing_into(log: Path) -> Iterator[None]:
    """What this process and those that begin in here print goes into a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(stream) for stream in (1, 2)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for stream in (1, 2):
            os.dup2(file, stream)
        yield
    finally:
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
            os.close(before)
        os.close(file)


def run_on_ranks(overrides: Sequence[str]) -> Run:
    """What `run_of` gives for the ranks of this task, on each of them; composed on rank 0 alone.

    Raises:
        UserError: what `run_of` raised on rank 0, on every rank.
    """
    import torch.distributed as dist

    from megalong.recipe.resolve import run_of

    found: list[Run | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [run_of(overrides, dist.get_world_size())]
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], UserError):
        raise found[0]
    assert found[0] is not None
    return found[0]
