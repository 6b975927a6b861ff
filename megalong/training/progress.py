"""Is a restarted job getting anywhere, and is it wanted? Each attempt notes its start in `run_dir/last_start.json`.

Only a restart by machine is judged (Slurm's requeue, torchrun's --max-restarts): a person who starts again has
changed something. Slurm requeues a job that was stopped to go on later; torchrun restarts whatever ended with a code
other than 0, also the run that somebody has just stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalong.runtime.console import warn
from megalong.runtime.errors import DataError, NoProgressError, StopRequestedError
from megalong.runtime.files import write_text
from megalong.runtime.json_file import read_json

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
        StopRequestedError: torchrun restarts what was asked to stop.
    """
    job, restarts = attempt(os.environ if env is None else env)
    path = run_dir / FILE
    before = _last(path)
    if restarts > 0 and before.get("job") == job and before.get("stopped") and job.startswith("torchrun"):
        raise StopRequestedError(
            f"job {job} was asked to stop and has saved step {step}: torchrun's restart {restarts} does not train on. "
            "Start it again by hand to go on."
        )
    if restarts > 0 and before.get("job") == job and before.get("step") == step and before.get("restarts") != restarts:
        raise NoProgressError(
            f"no progress: attempt {restarts + 1} of job {job} would begin at step {step}, as the one before it did. "
            "See why that one ended; then start a new job."
        )
    write_text(path, json.dumps({"job": job, "restarts": restarts, "step": step}) + "\n")


def note_stop(run_dir: Path) -> None:
    """Note that the attempt under way ends because it was asked to."""
    path = run_dir / FILE
    with contextlib.suppress(OSError):  # without the note a restart trains on, nothing worse
        write_text(path, json.dumps(_last(path) | {"stopped": True}) + "\n")


def _last(path: Path) -> dict[str, Any]:
    """What was noted before; nothing where the note is missing or unreadable, since then nobody can judge."""
    if not path.exists():
        return {}
    try:
        return read_json(path, DataError)
    except DataError as error:
        warn(f"{error} Whether the attempt before this one got anywhere is not judged.")
        return {}
