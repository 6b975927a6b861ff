"""A rank that dies, stops, stands still or raises ends the run on all ranks, and is named once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalong.runtime.watchdog import Heard, Place, judge
from tests.runtime.processes import free_port, slurm_like

REPO = Path(__file__).parents[2]
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


SCRIPT = """
import os, sys, time
from megalong.runtime import launch, watchdog

def entry(process):
    import torch, torch.distributed as dist
    launch.init_process_group(process, 300.0, {silent})
    for step in range(1, 10000):
        watchdog.enter("training", step)
        if step == 5 and process.rank == 0:
            print("going", flush=True)
        if step == 50 and process.rank == {rank}:
            {what}
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)
    return 0

sys.exit(launch.run(entry))
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    """Processes of a test; none outlives it."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def run_ranks(
    started: list[subprocess.Popen], tmp_path: Path, what: str, rank: int, silent: float = 3.0
) -> list[subprocess.Popen]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(what=what, rank=rank, silent=silent))
    port = free_port()
    started += [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=slurm_like(r, 3, port) | {"PYTHONPATH": str(REPO)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    return started


def outcome(processes: list[subprocess.Popen], timeout: float = 60) -> tuple[list[int], str]:
    texts = [p.communicate(timeout=timeout)[1] for p in processes]
    return [p.returncode for p in processes], "".join(texts)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_raises_speaks_alone_and_all_leave(
    started: list[subprocess.Popen], tmp_path: Path, rank: int
) -> None:
    codes, errors = outcome(run_ranks(started, tmp_path, "raise ValueError('boom')", rank, silent=60.0))
    assert codes == [1, 1, 1]
    assert errors.count("megalong:") == 1
    assert errors.count("Traceback") == 1
    assert f"rank {rank} on host {os.uname().nodename}, step 50, training raised ValueError: boom" in errors


def test_a_users_mistake_on_one_rank_ends_all_with_its_code(started: list[subprocess.Popen], tmp_path: Path) -> None:
    what = "from megalong.runtime.errors import DataError; raise DataError('a damaged file')"
    codes, errors = outcome(run_ranks(started, tmp_path, what, 1, silent=60.0))
    assert codes == [2, 2, 2]
    assert errors.strip() == "megalong: a damaged file"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named(started: list[subprocess.Popen], tmp_path: Path, rank: int) -> None:
    codes, errors = outcome(run_ranks(started, tmp_path, "os.kill(os.getpid(), 9)", rank))
    assert sorted(codes) == [-9, 1, 1]
    assert errors.count("megalong:") == 1
    assert f"lost rank {rank}" in errors


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_stopped_is_named(started: list[subprocess.Popen], tmp_path: Path, rank: int) -> None:
    processes = run_ranks(started, tmp_path, "os.kill(os.getpid(), 19)", rank)
    others = [p for r, p in enumerate(processes) if r != rank]
    codes, errors = outcome(others)
    assert processes[rank].poll() is None
    processes[rank].send_signal(signal.SIGKILL)
    processes[rank].communicate()
    assert codes == [1, 1]
    assert errors.count("megalong:") == 1
    assert f"lost rank {rank}" in errors


@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_comes_is_told_once(started: list[subprocess.Popen], tmp_path: Path, absent: int) -> None:
    script = tmp_path / "script.py"
    text = SCRIPT.format(what="pass", rank=0, silent=3.0).replace("300.0, 3.0", "300.0, 3.0, 4.0")
    script.write_text(text)
    port = free_port()
    for rank in range(3):
        if rank != absent:
            env = slurm_like(rank, 3, port) | {"PYTHONPATH": str(REPO)}
            pipe = subprocess.PIPE
            started.append(
                subprocess.Popen([sys.executable, str(script)], env=env, stdout=pipe, stderr=pipe, text=True)
            )
    codes, errors = outcome(started)
    assert codes == [1, 1]
    assert errors.count("megalong: ") == 1
    assert ("is rank 0 there?" if absent == 0 else "1 of 3 ranks have not come: rank 2.") in errors


def test_a_pause_of_the_whole_run_is_nobodys_fault(started: list[subprocess.Popen], tmp_path: Path) -> None:
    processes = run_ranks(started, tmp_path, "pass", 1, silent=2.0)
    assert processes[0].stdout is not None
    assert processes[0].stdout.readline() == "going\n"
    for sent in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            process.send_signal(sent)
        time.sleep(5)
    assert [p.poll() for p in processes] == [None] * 3
    for process in processes:
        process.kill()
        process.communicate()
