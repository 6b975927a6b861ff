"""Which rank am I, how do ranks meet, and how does a mistake reach the user exactly once?

Understands torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...), one task per GPU under Slurm (SLURM_PROCID, ...), and
a plain single process.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from megalong.runtime.errors import EXIT_OK, EXIT_SAVED_ON_SIGNAL, UserError
from megalong.runtime.watchdog import Watchdog

T = TypeVar("T")

_watchdog: Watchdog | None = None

FLIGHT_RECORDER = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_FR_BUFFER_SIZE": "20000",
}
"""What NCCL should keep of its last collectives, and write down when one times out."""


@dataclass(frozen=True)
class Process:
    """This process among all that were started together."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    """torchrun, slurm or single."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks to the console."""
        return self.rank == 0


def this_process(env: dict[str, str] | None = None) -> Process:
    """Read rank and world size from what torchrun or Slurm set.

    Slurm counts only inside a job step (`srun`): in a batch script itself SLURM_NTASKS is set too, but no
    other task would ever join.

    Raises:
        UserError: the variables are incomplete.
    """
    env = dict(os.environ) if env is None else env
    if "RANK" in env and "WORLD_SIZE" in env:
        return Process(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)), "torchrun")
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        world = env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS")
        if world is None:
            raise UserError("Slurm set SLURM_PROCID but no SLURM_NTASKS: start with srun --ntasks=<ranks>.")
        return Process(int(env["SLURM_PROCID"]), int(world), int(env.get("SLURM_LOCALID", 0)), "slurm")
    return Process(0, 1, 0, "single")


def master_address(env: dict[str, str] | None = None) -> tuple[str, int]:
    """Host and port where ranks meet; from torchrun, or the first host and the job id under Slurm."""
    env = dict(os.environ) if env is None else env
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_PORT" in env:
        return host, int(env["MASTER_PORT"])
    # two jobs that share a host, and a requeued job whose old port lingers, must not meet
    job, restart = int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_RESTART_COUNT", 0))
    return host, 20000 + (job * 7 + restart) % 20000


def _first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `a[03-05,9],b` -> `a03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not match:
        return "127.0.0.1"
    prefix, inside, suffix = match.groups()
    return prefix + (re.split(r"[-,]", inside)[0] if inside else "") + (suffix or "")


def init_process_group(process: Process, timeout_s: float, silent_after_s: float = 60.0) -> None:
    """Join all ranks into one torch.distributed world (nccl on GPUs, gloo on CPUs) and watch over them.

    Args:
        timeout_s: seconds after which a collective that nobody answers fails.
        silent_after_s: seconds without a sign of life after which a rank counts as lost.
    """
    import torch.distributed as dist

    from megalong.runtime import device

    global _watchdog
    timeout = timedelta(seconds=timeout_s)
    device.set_cuda_device(process.local_rank)
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    if process.launcher == "single":
        dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    host, port = master_address()
    os.environ.setdefault("MASTER_ADDR", host)
    os.environ.setdefault("MASTER_PORT", str(port))
    dist.init_process_group(device.backend(), rank=process.rank, world_size=process.world_size, timeout=timeout)
    patience = timedelta(seconds=silent_after_s)
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives an attempt
    keys = dist.PrefixStore(f"megalong/{attempt}", store)
    _watchdog = Watchdog(keys, process.rank, process.world_size, silent_after_s, 0.9 * timeout_s)
    dist.barrier()
    _watchdog.start()


def together(fn: Callable[[], T]) -> T:
    """Run `fn` on every rank; if it raises a `UserError` on any, raise that same error on all.

    So a file that is damaged for one rank ends the run with one message instead of a hang.

    Raises:
        UserError: the first rank's error, of its own class, prefixed with its rank unless all ranks share it.
    """
    import torch.distributed as dist

    error: UserError | None = None
    value: Any = None
    try:
        value = fn()
    except UserError as caught:
        error = caught
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if error is not None:
            raise error
        return value
    found: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, error)
    failed = [(rank, e) for rank, e in enumerate(found) if e is not None]
    if failed:
        rank, first = failed[0]
        everywhere = len(failed) == len(found)
        raise first if everywhere else type(first)(f"rank {rank}: {first}")
    return value


def run(entry: Callable[[Process], int], wait_s: float = 60.0) -> int:
    """Run an entry point; what ends it is printed once, whichever rank it happened on.

    A `UserError` is printed without a traceback; on anything else the run ends on all ranks within seconds, naming
    the rank, with its traceback (`watchdog`).

    Args:
        entry: takes this process and returns an exit code.
        wait_s: seconds that the other ranks leave to rank 0 for speaking before the ranks have met: torchrun ends all
            as soon as one has gone.

    Returns:
        the exit code.
    """
    global _watchdog
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else C++ prints a stack for every store that goes away
    process = this_process()
    try:
        code = entry(process)
    except UserError as error:
        if _watchdog is not None:
            _watchdog.end(str(error), code=error.exit_code)
        if process.is_first:
            print(f"\nmegalong: {error}\n", file=sys.stderr, flush=True)
        elif process.launcher == "torchrun":
            time.sleep(wait_s)
        code = error.exit_code
    except Exception as error:
        if _watchdog is not None:
            _watchdog.crashed(error)
        raise
    import torch.distributed as dist

    if dist.is_initialized():
        if _watchdog is not None:
            _watchdog.close()
            _watchdog = None
        if code in (EXIT_OK, EXIT_SAVED_ON_SIGNAL):
            dist.barrier()  # the store lives on rank 0: nobody may still need it
        dist.destroy_process_group()
    return code
