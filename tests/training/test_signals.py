"""A signal on one rank ends the step on all: saved, exit code 85, and the resumed run is the unbroken one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.processes import free_port, slurm_like

REPO = Path(__file__).parents[2]


def command(run_dir: Path) -> list[str]:
    small = ["model.num_hidden_layers=1", "data.eval_sequences=0", "train.steps=60", "checkpoint.save_steps=0"]
    return [sys.executable, "megalong/pretrain.py", "+stage=65k", "+scale=mini", f"run_dir={run_dir}", *small]


def start(run_dir: Path, rank: int, world: int, port: int) -> subprocess.Popen:
    env = slurm_like(rank, world, port)
    return subprocess.Popen(command(run_dir), cwd=REPO, env=env, stdout=subprocess.PIPE, text=True)


def wait_for_steps(run_dir: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    path = run_dir / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes)
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_on_one_rank_saves_and_exits_with_85_on_all(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    processes = [start(tmp_path, rank, 2, port) for rank in range(2)]
    wait_for_steps(tmp_path, 3, processes)
    processes[1].send_signal(number)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [85, 85]
    assert "stopped by a signal" in outputs[0]
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{steps[-1]:08d}"
    assert steps[-1] < 60
