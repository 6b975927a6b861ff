"""Starts ranks as separate processes, as a cluster would."""

import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

from megalong.runtime.ranks import warm_processes


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def slurm_like(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment of one task per rank, as srun makes it."""
    own = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world_size), "SLURM_LOCALID": str(rank)}
    meet = {"SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return os.environ | own | meet


class WarmProcess:
    """What `subprocess.Popen([python, *command])` is, but for torch and megatron-core, which it finds imported.

    Args:
        command: a script and its arguments.
        log: takes stdout and stderr.
    """

    def __init__(self, command: list[str], cwd: Path, env: dict[str, str], log: Path) -> None:
        self._process = warm_processes().Process(target=_become, args=(command, cwd, env, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> None:
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
