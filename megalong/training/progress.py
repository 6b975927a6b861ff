"""Is a restarted job getting anywhere? Where each attempt began is noted in `run_dir/last_start.json`.

Only a restart by machine is judged (Slurm's requeue, torchrun's --max-restarts): a person who starts again has
changed something.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from megalong.runtime.errors import NoProgressError
from megalong.runtime.files import write_text

FILE = "last_start.json"


def attempt(env: Mapping[str, str]) -> tuple[str, int]:
    """The job that this process belongs to and how often it has been restarted."""
    if "SLURM_JOB_ID" in env:
        return f"slurm {env['SLURM_JOB_ID']}", int(env.get("SLURM_RESTART_COUNT", 0))
    if "TORCHELASTIC_RUN_ID" in env:
        return f"torchrun {env['TORCHELASTIC_RUN_ID']}", int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    return "by hand", 0


def require_progress(run_dir: Path, step: int, env: Mapping[str, str] | None = None) -> None:
    """Note that an attempt begins at `step`.

    Args:
        step: steps that are saved.

    Raises:
        NoProgressError: the attempt before it, of the same job, began there too.
    """
    job, restarts = attempt(os.environ if env is None else env)
    path = run_dir / FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if restarts > 0 and before.get("job") == job and before.get("step") == step and before.get("restarts") != restarts:
        raise NoProgressError(
            f"no progress: attempt {restarts + 1} of job {job} would begin at step {step}, as the one before it did. "
            "See why that one ended; then start a new job."
        )
    write_text(path, json.dumps({"job": job, "restarts": restarts, "step": step}) + "\n")
