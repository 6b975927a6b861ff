"""The smallest stage that walks the whole path, submitted as a user would."""

import json
from pathlib import Path

from tests.slurm.cluster import Cluster

STEPS = 30
SMALL = ("+scale=mini", "model.num_hidden_layers=1", "data.eval_sequences=0", "checkpoint.save_steps=0")
ENV = {"MEGALONG_GPU_FLAG": "none", "MEGALONG_GPUS_PER_NODE": "1"}


def submit(
    cluster: Cluster, run_dir: Path, *more: str, nodes: int = 4, spare: int = 0, env: dict[str, str] | None = None
) -> str:
    """Submit stage 65k with one rank per node; returns the job's number."""
    variables = ENV | {"MEGALONG_SPARE_NODES": str(spare)} | (env or {})
    command = ("slurm/stage.sbatch", f"--nodes={nodes}", "+stage=65k", f"run_dir={run_dir}", *SMALL, *more)
    return cluster.run(*command, env=variables).strip()


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    """The run's metrics so far, one entry per step."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def log_of(run_dir: Path, job: str) -> str:
    """The job's own log."""
    return (run_dir / "logs" / f"job-{job}.log").read_text()
