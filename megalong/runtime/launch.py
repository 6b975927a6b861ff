"""A process learns its rank, meets the others, and tells a mistake exactly once.

Understands torchrun (RANK, WORLD_SIZE, LOCAL_RANK, ...), one task per GPU under Slurm (SLURM_PROCID, ...), and
a plain single process.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from megalong.runtime import console, live
from megalong.runtime.called import as_called
from megalong.runtime.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_SAVED_ON_SIGNAL, ConfigError, JoinError, UserError
from megalong.runtime.torchrun import last_words
from megalong.runtime.watchdog import Watchdog, enter

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


def ranks_per_node(env: dict[str, str] | None = None) -> int | None:
    """Ranks that were started on this node, from what torchrun or Slurm set; None where neither says."""
    env = dict(os.environ) if env is None else env
    told = env.get("LOCAL_WORLD_SIZE") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    match = re.match(r"\d+", told)  # Slurm: 8(x64), or 8,4 where nodes differ
    return int(match[0]) if match else None


def nodes(env: dict[str, str] | None = None) -> int:
    """Nodes that torchrun started on, or that Slurm has given the step or the job; 1 where neither says."""
    env = dict(os.environ) if env is None else env
    told = env.get("GROUP_WORLD_SIZE") or env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_JOB_NUM_NODES") or "1"
    return int(told) if told.isdigit() else 1


def master_address(env: dict[str, str] | None = None) -> tuple[str, int]:
    """Host and port where ranks meet; from torchrun, or the first host and the job id under Slurm."""
    env = dict(os.environ) if env is None else env
    host = env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_PORT" in env:
        return host, int(env["MASTER_PORT"])
    return host, port_of_job(int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_RESTART_COUNT", 0)))


def port_of_job(job: int, restarts: int) -> int:
    """Port where a Slurm job's ranks meet; two jobs on one host, or a job and its own last start, must not."""
    return 20000 + (job * 7 + restarts) % 20000


def _first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `a[03-05,9],b` -> `a03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if not match:
        return "127.0.0.1"
    prefix, inside, suffix = match.groups()
    return prefix + (re.split(r"[-,]", inside)[0] if inside else "") + (suffix or "")


def init_process_group(process: Process, timeout_s: float, silent_after_s: float = 60.0, join_s: float = 600.0) -> None:
    """Join all ranks into one torch.distributed world (nccl on GPUs, gloo on CPUs) and watch over them.

    Args:
        timeout_s: seconds after which a collective that nobody answers fails.
        silent_after_s: seconds without a sign of life after which a rank counts as lost.
        join_s: seconds that ranks wait for one another at the start.

    Raises:
        JoinError: a rank did not come.
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
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then torchrun holds the store
    attempt = f"megalong/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # torchrun's outlives an attempt

    def connect(holder: bool, patience_s: float) -> Any:
        deadline = time.monotonic() + join_s
        while True:  # torch tries twice for as long as it is given: short attempts keep to the time
            attempt_s = 1.0 + min(4.0, max(0.0, deadline - time.monotonic()) / 2)
            try:
                store = dist.TCPStore(
                    host, port, is_master=holder, wait_for_workers=False, timeout=timedelta(seconds=attempt_s)
                )
                store.set_timeout(timedelta(seconds=patience_s))
                return store
            except RuntimeError:
                if holder or time.monotonic() > deadline:
                    raise

    enter(f"waiting for {process.world_size} ranks")
    try:
        store = connect(process.is_first and not agent, join_s)
        watched = dist.PrefixStore(f"{attempt}/watch", connect(False, silent_after_s))
    except RuntimeError as error:
        if process.is_first and not agent:
            raise ConfigError(f"port {port} of {host} cannot be used: {str(error).splitlines()[0]}") from error
        raise JoinError(f"nobody answered at {host}:{port} for {join_s:.0f} s: is rank 0 there?", 1) from error
    _watchdog = Watchdog(watched, process.rank, process.world_size, silent_after_s, 0.9 * timeout_s)
    _all_here(dist.PrefixStore(f"{attempt}/join", store), process, join_s)
    _watchdog.start()
    enter("making groups")
    group = dist.PrefixStore(f"{attempt}/group", store)
    store.set_timeout(timeout)
    dist.init_process_group(
        device.backend(), store=group, rank=process.rank, world_size=process.world_size, timeout=timeout
    )


def _all_here(store: Any, process: Process, join_s: float) -> None:
    """Wait until every rank has said that it is there. Rank 0 counts; the others learn from it that it gave up."""
    names = [str(rank) for rank in range(process.world_size)]
    text = f"after {join_s:.0f} s, not all of {process.world_size} ranks have come."
    try:
        store.set(names[process.rank], os.uname().nodename)
        try:
            store.wait(names, timedelta(seconds=join_s if process.is_first else 2 * join_s))
        except RuntimeError:
            missing = [name for name in names if not store.check([name])]
            named = ", ".join(missing[:16]) + (" ..." if len(missing) > 16 else "")
            text = (
                f"after {join_s:.0f} s, {len(missing)} of {process.world_size} ranks have not come: rank {named}. See "
                "their logs; nodes that start slowly need a larger train.join_s."
            )
            store.set("given up", "")
            for name in missing:
                store.set(name, "")  # ends the waiting of the others
            time.sleep(2.0)  # they read it from here
        given_up = store.check(["given up"])
    except RuntimeError as error:
        raise JoinError("rank 0 went away before all ranks were there.", 1) from error
    if given_up:
        raise JoinError(text, 0)


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
    try:
        process = this_process()
    except UserError as error:
        print(f"\nmegalong: {error}\n", file=sys.stderr, flush=True)
        return error.exit_code
    try:
        with live.shown(process.is_first):
            code = entry(process)
    except UserError as error:
        if _watchdog is not None and _watchdog.started:
            _watchdog.end(str(error), code=error.exit_code)
        if process.rank == getattr(error, "speaker", 0):
            said = f"megalong: {as_called(str(error))}"
            print(f"\n{said}\n", file=sys.stderr, flush=True)
            last_words(said)
        elif process.launcher == "torchrun":
            # nothing is left to save, and what ends well torchrun does not list beside the rank that speaks
            signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_OK))
            time.sleep(wait_s + process.local_rank / 2)  # still here: the mistake is not rank 0's, so it has to be told
            print(f"\nmegalong: rank {process.rank}: {error}\n", file=sys.stderr, flush=True)
            last_words(f"megalong: rank {process.rank}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:  # before signals are noted: nothing has begun
        console.shout("\nmegalong: Ctrl-C")
        code = EXIT_INTERRUPTED
    except Exception as error:
        if _watchdog is not None and _watchdog.started:
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
    console.settle()
    return code
