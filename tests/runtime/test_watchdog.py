"""A rank that dies, stops, stands still or raises ends the run on all ranks, and is named once."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalong.runtime import launch, watchdog
from megalong.runtime.errors import DataError
from megalong.runtime.ranks import warm_processes
from megalong.runtime.watchdog import Heard, Place, judge
from tests.runtime.processes import free_port, slurm_like
from tests.variants import long_but

BEAT, SILENT, STILL = 1.0, 10.0, 100.0


def heard(**changes: object) -> Heard:
    values = {
        "host": "n1",
        "step": 7,
        "phase": "training",
        "changes": 20,
        "silent_s": 0.5,
        "still_s": 3.0,
        "broken": "",
    }
    values |= changes
    silent, still = float(str(values.pop("silent_s"))), float(str(values.pop("still_s")))
    return Heard(Place(**values), silent, still)  # type: ignore[arg-type]


def verdict(*ranks: Heard) -> str | None:
    return judge(dict(enumerate(ranks)), SILENT, STILL, BEAT)


def test_ranks_that_beat_and_go_on_are_left_alone() -> None:
    assert verdict(heard(), heard(changes=19, still_s=99), heard(silent_s=9.9)) is None


def test_a_silent_rank_is_named_with_host_step_and_phase() -> None:
    why = verdict(heard(), heard(silent_s=11, host="n2", step=6, phase="saving"))
    assert why is not None
    assert "rank 1 on host n2, step 6, saving" in why
    assert "rank 0" not in why


def test_after_a_failed_collective_a_few_missing_beats_are_enough() -> None:
    broken = heard(broken="RuntimeError: Connection closed by peer")
    assert verdict(broken, heard(silent_s=3)) is None
    assert "rank 1" in str(verdict(broken, heard(silent_s=5)))


def test_the_rank_that_stands_still_is_named_and_not_those_who_wait_for_it() -> None:
    ranks = [
        heard(still_s=101),
        heard(still_s=101),
        heard(still_s=120, changes=19, phase="reading data"),
        heard(still_s=101),
    ]
    why = str(verdict(*ranks))
    assert "rank 2 on host n1, step 7, reading data" in why
    assert "rank 1" not in why


def test_one_rank_that_goes_on_keeps_the_run_alive() -> None:
    assert verdict(heard(still_s=500), heard(still_s=99)) is None


def test_a_collective_that_failed_while_all_live_names_who_is_behind() -> None:
    broken = heard(broken="RuntimeError: Timed out", still_s=7)
    assert verdict(heard(broken="RuntimeError: Timed out", still_s=2), heard()) is None
    why = str(verdict(broken, heard(changes=18, phase="evaluating"), broken))
    assert "failed on rank 0, 2" in why
    assert "rank 1 on host n1, step 7, evaluating" in why


Deed = Callable[[], None]
FAULT = 120
"""Step of the deed: a second after the first one, when all have heard of one another."""


def raise_boom() -> None:
    raise ValueError("boom")


def mistake() -> None:
    raise DataError("a damaged file")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def rank_main(folder: Path, rank: int, port: int, at_fault: int, deed: Deed | None, silent: float, join: float) -> None:
    """A process that does small steps until `deed` on one rank ends it."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    os.environ.clear()
    os.environ.update(slurm_like(rank, 3, port))

    def entry(process: launch.Process) -> int:
        launch.init_process_group(process, 300.0, silent, join)
        for step in range(1, 100_000):
            watchdog.enter("training", step)
            (folder / f"step{rank}").write_text(str(step))
            if step == FAULT and rank == at_fault and deed is not None:
                deed()
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
        return 0

    sys.exit(launch.run(entry))


class Ranks:
    """Three processes; torch is imported once, by the server they are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[int, BaseProcess] = {}

    def start(
        self, at_fault: int, deed: Deed | None, silent: float = 3.0, join: float = 60.0, absent: int | None = None
    ) -> None:
        context = warm_processes()
        port = free_port()
        for rank in range(3):
            if rank != absent:
                arguments = (self.folder, rank, port, at_fault, deed, silent, join)
                self.processes[rank] = context.Process(target=rank_main, args=arguments)
                self.processes[rank].start()

    def outcome(self, without: int | None = None) -> tuple[list[int | None], str]:
        """Exit codes and what was written to stderr, of all or all but one."""
        ranks = [r for r in self.processes if r != without]
        for rank in ranks:
            self.processes[rank].join(60)
        codes = [self.processes[r].exitcode for r in ranks]
        return codes, "".join((self.folder / f"err{r}").read_text() for r in ranks)

    def signal(self, number: int) -> None:
        for process in self.processes.values():
            assert process.pid is not None
            os.kill(process.pid, number)


@pytest.fixture
def three(tmp_path: Path) -> Iterator[Ranks]:
    """No process of a test outlives it."""
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes.values():
        process.kill()
        process.join()


@pytest.mark.parametrize("rank", long_but([0, 2], 2))
def test_a_rank_that_raises_speaks_alone_and_all_leave(three: Ranks, rank: int) -> None:
    three.start(rank, raise_boom, silent=60.0)
    codes, errors = three.outcome()
    assert codes == [1, 1, 1]
    assert errors.count("megalong:") == 1
    assert errors.count("Traceback") == 1
    assert f"rank {rank} on host {os.uname().nodename}, step {FAULT}, training raised ValueError: boom" in errors


def test_a_users_mistake_on_one_rank_ends_all_with_its_code(three: Ranks) -> None:
    three.start(1, mistake, silent=60.0)
    codes, errors = three.outcome()
    assert codes == [2, 2, 2]
    assert errors.strip() == "megalong: a damaged file"


@pytest.mark.parametrize("rank", long_but([0, 1], 0))
def test_a_rank_that_is_killed_is_named(three: Ranks, rank: int) -> None:
    three.start(rank, die)
    codes, errors = three.outcome()
    assert codes == [-9 if r == rank else 1 for r in range(3)]
    assert errors.count("megalong:") == 1
    assert f"lost rank {rank} on host {os.uname().nodename}, step " in errors


@pytest.mark.parametrize("rank", long_but([0, 2], 2))
def test_a_rank_that_is_stopped_is_named(three: Ranks, rank: int) -> None:
    three.start(rank, stop)
    codes, errors = three.outcome(without=rank)
    assert three.processes[rank].is_alive()
    assert codes == [1, 1]
    assert errors.count("megalong:") == 1
    assert f"lost rank {rank} on host {os.uname().nodename}, step " in errors


@pytest.mark.parametrize("absent", long_but([0, 2], 2))
def test_a_rank_that_never_comes_is_told_once(three: Ranks, absent: int) -> None:
    three.start(0, None, join=4.0, absent=absent)
    codes, errors = three.outcome()
    assert codes == [1, 1]
    assert errors.count("megalong: ") == 1
    assert ("is rank 0 there?" if absent == 0 else "1 of 3 ranks have not come: rank 2.") in errors


def test_a_pause_of_the_whole_run_is_nobodys_fault(three: Ranks) -> None:
    def step() -> int:
        path = three.folder / "step0"
        while path.is_file():
            if text := path.read_text():  # empty for a moment while it is written
                return int(text)
        return 0

    three.start(0, None, silent=2.0)
    while step() < 5:
        time.sleep(0.05)
    three.signal(signal.SIGSTOP)
    time.sleep(5)
    three.signal(signal.SIGCONT)
    before = step()
    time.sleep(3)
    assert step() > before
    assert all(p.is_alive() for p in three.processes.values())
