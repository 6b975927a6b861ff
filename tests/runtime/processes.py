"""Starts ranks as separate processes, as a cluster would."""

import os
import socket


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
