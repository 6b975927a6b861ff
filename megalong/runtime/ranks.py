"""How are several ranks run on one machine without torchrun? A pool of CPU processes, started once and reused.

Importing torch and megatron-core takes seconds and half a GiB: one process does it, and every rank is a fork of that
one. A task on a running pool takes milliseconds. Every task gets a fresh gloo process group of the size it asks for, so
tasks cannot disturb one another.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

MAX_RANKS = 8
# What nearly every task imports, in this order. Nothing of this package: a rank imports that as its parent would.
PRELOADED = ["torch", "megatron.core.tensor_parallel", "hydra", "transformers.models.llama.modeling_llama"]


class RankFailed(RuntimeError):
    """A task raised on one rank, a rank died, or the task ran out of time; the text carries the rank's traceback."""


def _work(connection: multiprocessing.connection.Connection, threads: int) -> None:
    import torch

    os.setsid()  # so that a rank that is killed takes what it started with it
    torch.set_num_threads(threads)
    from megalong.runtime import console, device

    console.quiet_libraries()
    device.install()
    gc.freeze()  # what was imported is never garbage: looking through it after each task would take longer than most
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_run_task(*task))


def _run_task(
    rank: int, world_size: int, store: str, timeout_s: float, fn: Callable[..., Any], args: tuple, kwargs: dict
) -> tuple[bool, Any]:
    import torch.distributed as dist
    from megatron.core import parallel_state

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    timeout = timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timeout
        )
        result = fn(*args, **kwargs)
        dist.barrier()
        return True, result
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # models and their groups hold one another, and a gloo thread wakes 100 times a second until then


def _kill_with_children(process: multiprocessing.process.BaseProcess) -> None:
    try:
        if process.pid is not None and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.kill()


def _collateral(failure: str) -> bool:
    """Whether a rank only tells that another one has gone."""
    last = failure.strip().splitlines()[-1].lower()
    return "raised:" in failure and any(word in last for word in ("connection", "gloo", "timed out", "broken pipe"))


def warm_processes() -> SpawnContext | ForkServerContext:
    """Makes processes that begin with torch and megatron-core imported, as forks of one that did it."""
    if Path("/dev/nvidiactl").exists():  # CUDA does not survive a fork, and an import may have asked for it
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class RankPool:
    """Up to `MAX_RANKS` CPU ranks, started when first needed.

    Args:
        threads: torch threads of each rank.

    Use as a context manager, or call `close()`.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._workers: list[tuple[multiprocessing.process.BaseProcess, multiprocessing.connection.Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="megalong-ranks-")
        self._tasks = 0

    def run(
        self, fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 300.0, **kwargs: Any
    ) -> list[Any]:
        """Run `fn(*args, **kwargs)` on ranks 0..world_size-1 of a fresh gloo group.

        Args:
            fn: a function that worker processes can import (module level); arguments and result are pickled.
            timeout_s: seconds after which the task counts as hung.

        Returns:
            the results in rank order.

        Raises:
            RankFailed: a rank raised, died or hung. The pool is then started anew for the next task.
        """
        assert 1 <= world_size <= MAX_RANKS, world_size
        self._start(world_size)
        self._tasks += 1
        store = str(Path(self._folder.name) / f"store-{self._tasks}")
        for rank in range(world_size):
            self._workers[rank][1].send((rank, world_size, store, timeout_s, fn, args, kwargs))
        return self._collect(world_size, time.monotonic() + timeout_s)

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {self._workers[r][1]: r for r in range(world_size)}
        while waiting and not any(not _collateral(text) for text in failures):
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.append(f"ranks {sorted(waiting.values())} did not finish in time")
                break
            for connection in ready:
                assert isinstance(connection, multiprocessing.connection.Connection)
                rank = waiting.pop(connection)
                try:
                    ok, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    failures.append(f"rank {rank} died")
                    continue
                if ok:
                    results[rank] = value
                    continue
                failures.append(f"rank {rank} of {world_size} raised:\n{value}")
                deadline = min(deadline, time.monotonic() + 5.0)  # the one at fault may speak later than its victims
        if failures:
            self._fail(next((text for text in failures if not _collateral(text)), failures[0]))
        return [results[r] for r in range(world_size)]

    def _fail(self, why: str) -> None:
        self._stop()
        raise RankFailed(why)

    def _start(self, count: int) -> None:
        context = warm_processes()
        while len(self._workers) < count:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, self.threads), daemon=False)
            process.start()
            there.close()
            self._workers.append((process, here))

    def _stop(self) -> None:
        for process, connection in self._workers:
            _kill_with_children(process)
            connection.close()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()

    def close(self) -> None:
        """End all ranks."""
        self._stop()
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
