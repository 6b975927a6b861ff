"""A user's mistake prints a few lines that end with what to do, has its exit code, and leaves nothing behind."""

from __future__ import annotations

import os
import resource
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from megalong.runtime.ranks import warm_processes
from tests.mistakes.table import MISTAKES, Mistake
from tests.mistakes.world import make_world
from tests.runtime.processes import free_port, slurm_like

REPO = Path(__file__).parents[2]
TORCHRUN_LINES = 36
"""torchrun's own: three lines of its log, the traceback of its ChildFailedError, its report of one rank."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("world")
    process = warm_processes().Process(target=make_world, args=(folder, REPO))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    before = listing(folder)
    yield folder
    assert listing(folder) == before


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time."""
    found = {str(p.relative_to(folder)): p.lstat() for p in sorted(folder.rglob("*"))}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}


def command_of(words: list[str]) -> list[str]:
    tool = words[0]
    path = REPO / ("megalong/pretrain.py" if tool == "pretrain" else f"tools/{tool}.py")
    if tool.endswith(".sbatch"):
        path = REPO / "slurm" / tool
    return [str(path), *words[1:]]


class _Missing:
    """A finder that finds nothing of one package, and lets nobody else look."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def _become(mistake: Mistake, world: Path, env: dict[str, str], log: Path) -> None:
    """What a shell would start, in a process that finds torch imported."""
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(world)
    if mistake.without:
        for name in [name for name in sys.modules if name.partition(".")[0] == mistake.without]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Missing(mistake.without))
    if mistake.file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (mistake.file_limit, mistake.file_limit))
    sys.argv = command_of(mistake.command.split())
    if sys.argv[0].endswith(".sbatch"):
        os.execve("/bin/bash", ["bash", *sys.argv], {"PATH": f"{Path(sys.executable).parent}:{world / 'bin'}"})
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_alone(mistake: Mistake, world: Path, log: Path) -> tuple[int, str]:
    """Exit code and what it printed, by a process that is not one of torchrun's."""
    env = dict(os.environ)
    with socket.socket() as busy:
        if mistake.port:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            env = slurm_like(0, 2, busy.getsockname()[1])
        elif mistake.torchrun:  # rank 0 of these: it must not wait for the others
            env |= {"RANK": "0", "WORLD_SIZE": str(mistake.torchrun), "MASTER_PORT": str(free_port())}
        process = warm_processes().Process(target=_become, args=(mistake, world, env, log))
        process.start()
        process.join(60)
        if process.exitcode is None:
            process.kill()
    assert process.exitcode is not None, log.read_text()
    return process.exitcode, log.read_text()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_short_says_what_to_do_and_writes_nothing(name: str, world: Path, tmp_path: Path) -> None:
    mistake, log, before = MISTAKES[name], tmp_path / "log", listing(world)
    code, text = run_alone(mistake, world, log)
    assert code == mistake.code, text
    assert "Traceback" not in text
    assert all(word in " ".join(text.split()) for word in mistake.says), text
    assert len([line for line in text.splitlines() if line.strip()]) <= mistake.lines, text
    assert listing(world) == before


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.torchrun])
def test_under_torchrun_it_is_the_last_thing_that_is_seen(name: str, world: Path) -> None:
    mistake, before = MISTAKES[name], listing(world)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={mistake.torchrun}"]
    command = [sys.executable, *launcher, *command_of(mistake.command.split())]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True, timeout=120)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 1  # torchrun's, whatever its ranks end with
    end = " ".join(" ".join(lines[-mistake.lines - 2 :]).split())
    assert all(word in end for word in mistake.says), done.stderr
    assert len(lines) <= TORCHRUN_LINES + 2 * mistake.lines, done.stderr
    assert "exitcode  : 2 " in done.stderr
    assert f'File "{REPO}/megalong' not in done.stderr
    assert listing(world) == before


def test_the_advice_for_a_window_and_for_steps_can_be_run() -> None:
    from megalong.recipe.resolve import run_of

    mini = ("+stage=65k", "+scale=mini")
    for window in (61440, 65536):
        assert run_of([*mini, f"stage.seq_length={window}"], 1).seq_length == window // 256
        assert run_of([*mini, f"stage.seq_length={window}", "topology.cp=4", "topology.tp=2"], 8).layout.cp == 4
    assert run_of(["+stage=65k", "stage.seq_length=131072", "stage.theta=null"]).theta > 15_296_098
    assert run_of(["+stage=65k", *["topology.tp=2", "topology.cp=4", "topology.pp=1", "topology.dp=1"]]).layout.tp == 2


def test_what_is_said_of_a_stage_at_a_scale_is_meant_at_that_scale() -> None:
    from megalong.recipe.resolve import run_of

    mini = ("+stage=65k", "+scale=mini")
    run = run_of([*mini, "stage.steps=3", "stage.global_batch_size=5", "stage.lr=1e-4"], 1)
    assert (run.steps, run.global_batch_size, run.lr) == (3, 5, 1e-4)
    assert (run.config.stage.steps, run.config.stage.global_batch_size) == (3, 5)
    assert (run_of(mini, 1).steps, run_of([*mini, "stage.steps=3", "train.steps=4"], 1).steps) == (15, 4)
    assert run_of(["+stage=65k", "stage.steps=3"]).steps == 3
