"""A signal on one rank ends the step on all: saved, exit code 85, and torchrun does not train on by itself."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalong.training.signals import too_impatient, torchrun_patience_s
from tests.runtime.processes import free_port, slurm_like

REPO = Path(__file__).parents[2]
LISTENER = """
import hashlib, signal, sys, time
{before}
from megalong.training.signals import StopRequest
stop = StopRequest()
print("ready", flush=True)
if "{busy}":  # C code that no Python handler interrupts
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**8)
while not stop.asked:
    time.sleep(0.01)
print("asked", flush=True)
"""


Start = Callable[..., subprocess.Popen]


def as_from_a_terminal() -> None:
    """The suite itself may run under nohup or in the background, where a shell has these ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes in the project's folder; what a failed test leaves behind is ended."""
    with contextlib.ExitStack() as stack:

        def begin(*command: str, **settings: Any) -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPO,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=as_from_a_terminal,
                **settings,
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield begin


def listener(start: Start, before: str = "", busy: str = "") -> subprocess.Popen:
    """A process that notes signals, without torch."""
    process = start("-c", LISTENER.format(before=before, busy=busy), stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_of_them_asks_the_run_to_stop(start: Start, number: signal.Signals) -> None:
    process = listener(start)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert (out, process.returncode) == ("asked\n", 0)
    assert f"megalong: {number.name}: the run ends, and is saved" in err


def test_what_nohup_ignores_stays_ignored(start: Start) -> None:
    process = listener(start, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None


def test_a_run_that_cannot_save_in_torchruns_patience_is_told_so() -> None:
    assert too_impatient(1.0, 1.0, 30.0) is None
    told = too_impatient(300.0, 60.0, 30.0)
    assert told is not None
    assert "--shutdown-timeout=571" in told
    assert "slurm/stage.sbatch" in told


@pytest.mark.parametrize(
    ("env", "parent", "seconds"),
    [
        ({}, ["python", "torchrun", "megalong/pretrain.py"], 30.0),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, [], 90.0),
        ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, ["torchrun", "--shutdown-timeout=600", "x.py"], 600.0),
        ({}, ["torchrun", "--shutdown_timeout", "70", "x.py"], 70.0),
        ({}, ["torchrun", "--shutdown-timeout"], 30.0),
    ],
)
def test_torchruns_patience_is_read_from_its_command_line(env: dict, parent: list[str], seconds: float) -> None:
    assert torchrun_patience_s(env, parent) == seconds


def command(run_dir: Path, steps: int = 60) -> list[str]:
    small = ["model.num_hidden_layers=1", "data.eval_sequences=0", f"train.steps={steps}", "checkpoint.save_steps=0"]
    return ["megalong/pretrain.py", "+stage=65k", "+scale=mini", f"run_dir={run_dir}", *small]


def wait_for_steps(run_dir: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    path = run_dir / "metrics.jsonl"
    while not path.is_file() or len(path.read_text().splitlines()) < steps:
        assert all(p.poll() is None for p in processes)
        time.sleep(0.05)


def saved_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, which must be the newest checkpoint."""
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step_{steps[-1]:08d}"
    return steps[-1]


def test_a_signal_on_one_rank_saves_and_exits_with_85_on_all(start: Start, tmp_path: Path) -> None:
    port = free_port()
    processes = [start(*command(tmp_path), env=slurm_like(rank, 2, port)) for rank in range(2)]
    wait_for_steps(tmp_path, 3, processes)
    processes[1].send_signal(signal.SIGINT)
    outputs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [85, 85]
    assert "stopped by a signal" in outputs[0]
    assert saved_step(tmp_path) < 60


def torchrun(start: Start, run_dir: Path, *settings: str) -> subprocess.Popen:
    """Two ranks, one restart allowed, as a shell would start it."""
    options = ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2", f"--master-port={free_port()}"]
    words = ["-m", "torch.distributed.run", *options, *command(run_dir, 5000), *settings]
    return start(*words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.STDOUT, start_new_session=True)


def ranks_of(agent: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.long
def test_torchrun_does_not_train_on_what_was_asked_to_stop(start: Start, tmp_path: Path) -> None:
    agent = torchrun(start, tmp_path)
    wait_for_steps(tmp_path, 2, [agent])
    os.kill(ranks_of(agent)[1], signal.SIGTERM)  # torchrun sees ranks that end with 85, and starts them again
    out = agent.communicate(timeout=120)[0]
    assert agent.returncode != 0
    assert "was asked to stop and has saved step" in out
    assert f"stopped by a signal after step {saved_step(tmp_path)};" in out


@pytest.mark.long
def test_a_second_ctrl_c_under_torchrun_leaves_no_rank_behind(start: Start, tmp_path: Path) -> None:
    agent = torchrun(start, tmp_path, "train.global_batch_size=4000")  # a step that takes minutes
    while not (tmp_path / "config.yaml").is_file():
        assert agent.poll() is None
        time.sleep(0.05)
    ranks = ranks_of(agent)
    for _ in range(2):
        agent.send_signal(signal.SIGINT)  # the terminal's Ctrl-C reaches torchrun alone
        time.sleep(1.0)
    out = agent.communicate(timeout=20)[0]
    assert "SIGINT: the run ends, and is saved, as soon as the step under way is done" in out
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchruns_answer_to_a_second_ctrl_c_counts_as_one(start: Start, number: signal.Signals) -> None:
    process = listener(start, busy="busy")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 130


def test_a_second_sigterm_is_patient(start: Start) -> None:
    process = listener(start, busy="busy")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)  # Slurm and container runtimes send it more than once
        time.sleep(0.2)
    assert process.poll() is None
