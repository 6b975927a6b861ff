"""Tasks are done on all cores by a pool of processes; the first that fails ends the work, and names itself."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from megalong.runtime.errors import DataError

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def run_all(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    workers: int,
    on_done: Callable[[_Task], Any] = lambda task: None,
    describe: Callable[[_Task], str] = str,
) -> list[_Result]:
    """`function` of every task, in the order of the tasks, whoever did them when.

    Args:
        function: of a module, so that processes can import it.
        workers: processes; 1: this one.
        on_done: called after each task, in the order in which they end.

    Raises:
        UserError: what a task raised.
        DataError: a process was killed.
    """
    if workers == 1 or len(tasks) <= 1:
        found = []
        for task in tasks:
            found.append(function(task))
            on_done(task)
        return found
    processes = min(workers, len(tasks))
    # not fork: tokenizers has threads, which do not survive it; not spawn: every process would import torch anew
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megalong.data.pipeline.mapping", "megalong.data.pipeline.laying_out"])
    threads = max(1, workers // processes)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(threads,))
    try:
        futures = {pool.submit(function, task): i for i, task in enumerate(tasks)}
        for future in as_completed(futures):
            future.result()
            on_done(tasks[futures[future]])
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        open_ = [describe(tasks[i]) for future, i in futures.items() if not future.done() or future.exception()]
        raise DataError(
            f"A process was killed, by the system for its memory perhaps, while {len(open_):,} tasks were open, the "
            f"first {open_[0] if open_ else '?'}. What is done stays; run the same command again, with fewer workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
