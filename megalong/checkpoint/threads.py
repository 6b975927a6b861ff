"""How do a checkpoint's files get written without extra processes? By threads of the rank itself.

megatron-core 0.16 forks a process per file and starts a manager process for their results, even for a synchronous
save: 270 MB and seconds per rank, orphans when a rank is killed, and a hang without end when a writer dies. Writing
files and their checksums releases Python's lock, so threads are as fast, and an error comes back as an error.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

_WRITER = filesystem_async.FileSystemWriterAsync


@contextmanager
def in_process() -> Iterator[None]:
    """Saves that are begun inside the block write their files in this process."""
    processes, results = _WRITER.write_preloaded_data_multiproc, filesystem_async._results_queue
    _WRITER.write_preloaded_data_multiproc = staticmethod(_write_in_threads)
    filesystem_async._results_queue = queue.Queue()
    try:
        yield
    finally:
        _WRITER.write_preloaded_data_multiproc, filesystem_async._results_queue = staticmethod(processes), results


def staged(request: AsyncRequest, live: Iterable[torch.Tensor] = ()) -> list[Any]:
    """Arguments of the request's writing function, with all tensors in host memory.

    Args:
        live: tensors that will change while they are written. Those in host memory are copied; all others are copies
            already, because they were gathered, or brought here from a GPU.
    """
    arguments = list(request.async_fn_args)
    if request.preload_fn is not None:
        changing = {tensor.untyped_storage().data_ptr() for tensor in live if tensor.is_cpu}

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone() if tensor.untyped_storage().data_ptr() in changing else tensor

        arguments[1] = [
            (file, key, (data, [(item, own(tensor)) for item, tensor in tensors]))
            for file, key, (data, tensors) in request.preload_fn()
        ]
    return arguments


def _write_in_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue
) -> None:
    """Stands in for `write_preloaded_data_multiproc`; same arguments, same answer on `results`."""
    answers: queue.Queue = queue.Queue()
    pending: queue.Queue = queue.Queue()

    def write(number: int, bucket: Any) -> None:
        pending.put(number)
        _WRITER.write_preloaded_data(
            transforms, number, bucket, results_queue=answers, count_queue=pending, use_fsync=True
        )

    with ThreadPoolExecutor(max(1, len(buckets)), thread_name_prefix="checkpoint") as threads:
        list(threads.map(write, range(len(buckets)), buckets))
    found = dict(answers.get_nowait() for _ in buckets)
    for answer in found.values():
        if isinstance(answer, Exception):
            raise answer
    results.put(found)
