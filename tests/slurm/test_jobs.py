"""Under a real Slurm: ranks in the order asked for, a signal loses nothing, a crash ends, a bad node is left out."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.convert.compare import tensor_differences
from megalong.convert.weights import open_weights
from tests.slurm.cluster import SHAKY, Cluster
from tests.slurm.stages import SMALL, STEPS, log_of, steps_of, submit

pytestmark = pytest.mark.long


def ranks_of(run_dir: Path, job: str) -> dict[int, list[str]]:
    """Rank -> nodes on which it ran, start by start, as the ranks themselves say."""
    found: dict[int, list[str]] = {}
    for log in (run_dir / "logs" / job).glob("rank-*.log"):
        for rank, node in re.findall(r"^rank (\d+) of \d+ on (\S+)", log.read_text(), re.MULTILINE):
            found.setdefault(int(rank), []).append(node)
    return found


def only_job(run_dir: Path) -> str:
    return next((run_dir / "logs").glob("job-*.log")).stem.removeprefix("job-")


def trained(run_dir: Path, steps: int) -> Callable[[], bool]:
    return lambda: len(steps_of(run_dir)) >= steps


def test_ranks_follow_the_leaf_switches_and_not_the_list_of_nodes(unbroken: Path) -> None:
    job = only_job(unbroken)
    assert ranks_of(unbroken, job) == {0: ["n1"], 1: ["n3"], 2: ["n2"], 3: ["n4"]}
    assert f"step {STEPS}/{STEPS}" in log_of(unbroken, job)  # rank 0 speaks in the job's log too


def test_a_signal_saves_and_the_same_job_ends_as_the_unbroken_run(
    cluster: Cluster, unbroken: Path, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, f"train.steps={STEPS}")
    cluster.wait(trained(tmp_path, 3), 120, "three steps")
    cluster.run("scancel", "--signal=USR1", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "was the first to end with code 85" in log_of(tmp_path, job)
    assert [(s["step"], s["loss"]) for s in steps_of(tmp_path)] == [(s["step"], s["loss"]) for s in steps_of(unbroken)]
    with open_weights(unbroken) as one, open_weights(tmp_path) as other:
        assert len(one.tensors) > 10
        assert list(tensor_differences(one, other)) == []


def test_a_run_that_makes_no_progress_is_started_twice_and_no_more(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "train.steps=3000", nodes=2)

    def kill_when_it_trains() -> bool:
        seen = steps_of(tmp_path)
        if seen and (victims := _ranks_running(tmp_path)):
            os.kill(victims[-1], signal.SIGKILL)
            return True
        return False

    cluster.wait(kill_when_it_trains, 120, "a first step")
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "93:0", "1")
    assert re.search(r"rank \d on n\d was the first to end with code 137", log_of(tmp_path, job))


def _ranks_running(run_dir: Path) -> list[int]:
    listed = subprocess.run(
        ["pgrep", "-f", rf"^[^ ]*python\S* -P -m megalong.pretrain .*run_dir={run_dir}"],
        capture_output=True,
        text=True,
    )
    return [int(pid) for pid in listed.stdout.split()]


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    by_hand = ("sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}/logs/job-%j.log")
    (tmp_path / "logs").mkdir()
    settings = ("+stage=65k", f"run_dir={tmp_path}", *SMALL, "train.steps=3000")
    job = cluster.run(*by_hand, "slurm/stage.sbatch", *settings, env={"MEGALONG_PYTHON": sys.executable}).strip()
    cluster.wait(trained(tmp_path, 2), 120, "two steps")
    cluster.run("scancel", job)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert "ended from outside" in log_of(tmp_path, job)
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{steps_of(tmp_path)[-1]['step']:08.0f}"


def test_a_bad_node_is_named_and_the_job_starts_again_without_it(cluster: Cluster, tmp_path: Path) -> None:
    occupied = cluster.run("sbatch", "--parsable", "--nodelist=n2", "--output=/dev/null", "--wrap=sleep 60").strip()
    job = submit(cluster, tmp_path, "--partition=shaky", "train.steps=1", nodes=2)  # n1 and the shaky one are left
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 60, "the first start to be given up")
    cluster.run("scancel", occupied)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExcNodeList"]) == ("COMPLETED", SHAKY)
    assert f"bad node {SHAKY}: {tmp_path} cannot be written: File too large" in log_of(tmp_path, job)
    assert ranks_of(tmp_path, job) == {0: ["n1"], 1: ["n2"]}


def test_a_spare_node_takes_the_place_of_a_dead_one_at_once(cluster: Cluster, tmp_path: Path) -> None:
    two_ranks_each = ("--ntasks-per-node=2", "--partition=shaky", "train.steps=1")
    cluster.crash(SHAKY)
    try:
        job = submit(cluster, tmp_path, *two_ranks_each, nodes=2, spare=1, env={"MEGALONG_NEIGHBOUR_S": "3"})
        cluster.wait(lambda: (tmp_path / "checkpoints" / "latest").is_file(), 120, "the run to be done")
    finally:
        cluster.boot(SHAKY)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0")
    assert f"bad node {SHAKY}: did not answer" in log_of(tmp_path, job)
    assert ranks_of(tmp_path, job) == {0: ["n1"], 1: ["n1"], 2: ["n2"], 3: ["n2"]}


def test_a_job_that_cannot_do_without_a_bad_node_says_so_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--partition=shaky", "train.global_batch_size=3", nodes=3)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "the partition has 2, and 3 are needed" in log_of(tmp_path, job)


def test_a_job_that_crashes_before_the_trainer_begins_is_started_twice_and_no_more(
    cluster: Cluster, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)  # has no torch
    job = submit(cluster, tmp_path / "run", nodes=1, env={"MEGALONG_PYTHON": str(tmp_path / "bare" / "bin" / "python")})
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "93:0", "1")
    assert "ModuleNotFoundError" in log_of(tmp_path / "run", job)
