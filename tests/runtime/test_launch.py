"""Ranks from torchrun or Slurm, and errors that reach the user once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megalong.runtime.errors import DataError, UserError
from megalong.runtime.launch import Process, master_address, this_process, together
from megalong.runtime.ranks import RankPool

REPO = Path(__file__).parents[2]


def test_torchruns_variables_are_understood() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}
    assert this_process(env) == Process(5, 8, 1, "torchrun")


def test_one_task_per_gpu_under_slurm_is_understood() -> None:
    env = {"SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert this_process(env) == Process(9, 16, 1, "slurm")


def test_a_batch_script_outside_a_step_is_a_single_process() -> None:
    assert this_process({"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}) == Process(0, 1, 0, "single")


def test_slurm_without_a_task_count_is_a_user_error() -> None:
    with pytest.raises(UserError, match="SLURM_NTASKS"):
        this_process({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"})


@pytest.mark.parametrize(
    ("nodelist", "host"), [("gpu[03-05,9],b", "gpu03"), ("n1,n2", "n1"), ("a-7", "a-7"), ("r[1-2]n", "r1n")]
)
def test_slurm_ranks_meet_on_the_first_host(nodelist: str, host: str) -> None:
    assert master_address({"SLURM_JOB_NODELIST": nodelist, "SLURM_JOB_ID": "7"})[0] == host


def test_a_requeued_job_and_another_job_meet_on_other_ports() -> None:
    ports = {
        master_address({"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart})[1]
        for job in ("10", "11")
        for restart in ("0", "1")
    }
    assert len(ports) == 4


def fail_on_one_rank(rank: int) -> str:
    def check() -> str:
        if dist.get_rank() == rank:
            raise DataError("a damaged file")
        return "fine"

    try:
        return together(check)
    except DataError as error:
        return str(error)


def test_an_error_on_one_rank_is_raised_on_all_and_names_the_rank(ranks: RankPool) -> None:
    assert ranks.run(fail_on_one_rank, 2, 1) == ["rank 1: a damaged file"] * 2
    assert ranks.run(fail_on_one_rank, 2, 7) == ["fine"] * 2


def test_under_torchrun_a_mistake_is_told_by_one_rank_without_a_traceback_and_stands_in_the_last_lines() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "megalong/pretrain.py"]
    run = subprocess.run([*command, "+stage=65k"], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert run.returncode != 0
    assert run.stderr.count("megalong: Stage 65k wants") == 2  # by the rank, and by torchrun for it
    assert "megalong: Stage 65k wants 8 GPUs" in "\n".join(run.stderr.strip().splitlines()[-8:])
    # torchrun adds the traceback of its own ChildFailedError; none may pass through our files
    assert f'File "{REPO}/megalong' not in run.stderr
