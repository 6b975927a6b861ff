"""Room on the disk for what the run will save: asked for before any GPU time is spent."""

from __future__ import annotations

import os
import shutil

from megalong.run import Run
from megalong.runtime.errors import ConfigError
from megalong.runtime.files import checkpoints_size


def check_disk_space(run: Run, checkpoint_bytes: int) -> None:
    """Compare the run's checkpoints with the disk of its run_dir.

    Args:
        checkpoint_bytes: size of one.

    Raises:
        ConfigError: no; the text says how much is needed and what is there.
    """
    settings = run.config.checkpoint
    saves = -(-run.steps // settings.save_steps) if settings.save_steps else 1
    if settings.save_minutes and run.config.scale.name == "full":  # a small one is over before the minutes are
        saves = run.steps
    # one more than is kept exists while it is written
    wanted = min(saves, max(1, settings.keep) + 1) * checkpoint_bytes
    folder = run.run_dir.absolute()
    there = checkpoints_size(folder)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted - there:
        raise ConfigError(
            f"run_dir={run.run_dir}: its disk has {free / 2**30:.2f} GiB free, and {wanted / 2**30:.2f} GiB are "
            f"needed for checkpoints of {checkpoint_bytes / 2**30:.2f} GiB (checkpoint.keep={settings.keep}, and "
            "one while it is written). Make room, choose another run_dir, or lower checkpoint.keep."
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"run_dir={run.run_dir}: {folder} cannot be written. Choose another run_dir.")
