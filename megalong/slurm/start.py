"""What follows from a job's number and how often it has been started: its signature, its ports, its ranks' environment.

The batch script of a job reads the environment from a file, since it is Python, perhaps in a container, that knows it.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megalong.runtime.errors import EXIT_SAVED_ON_SIGNAL
from megalong.runtime.launch import FLIGHT_RECORDER, port_of_job


@dataclass(frozen=True)
class Start:
    """One start of a job."""

    job: int
    restarts: int
    """How often the job has been requeued."""

    def says(self, text: str) -> str:
        """A line for the job's log."""
        return f"job {self.job}, start {self.restarts}: {text}"

    @property
    def neighbour_port(self) -> int:
        """Port of the first node's listener when nodes measure their links; each further node has the next one."""
        return 10000 + self.job * 64 % 10000

    def environment(self, address: str, logs: str) -> dict[str, str]:
        """What every rank finds in its environment.

        Args:
            address: of rank 0's node.
            logs: folder of the job's logs, where a hang leaves a record of what each rank was waiting for.
        """
        return {
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port_of_job(self.job, self.restarts)),
            **FLIGHT_RECORDER,
            "TORCH_FR_DUMP_TEMP_FILE": f"{logs}/waiting-rank-",
            "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": f"{logs}/waiting-rank-",
            "MEGALONG_EXIT_SAVED": str(EXIT_SAVED_ON_SIGNAL),
        }


def this_start(env: Mapping[str, str] = os.environ) -> Start:
    """The start of the job that this process belongs to; both numbers are 0 outside Slurm."""
    return Start(int(env.get("SLURM_JOB_ID", 0)), int(env.get("SLURM_RESTART_COUNT", 0)))


def write_environment(path: Path, values: Mapping[str, str]) -> None:
    """Write what a shell reads with `.`."""
    lines = (f"export {name}={shlex.quote(value)}\n" for name, value in values.items())
    path.write_text("".join(lines), encoding="utf-8")
