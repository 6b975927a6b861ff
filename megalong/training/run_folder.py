"""The marks that a run leaves in its run_dir before its first step, so that whoever resumes it finds what counts."""

from __future__ import annotations

from megalong.checkpoint import pointer
from megalong.recipe.compose import to_yaml
from megalong.run import Run
from megalong.runtime.console import warn
from megalong.runtime.errors import ConfigError
from megalong.runtime.files import write_text
from megalong.training.progress import FILE as NOTE
from megalong.training.progress import require_progress
from megalong.training.state import State


def begin(run: Run, state: State) -> None:
    """Note the attempt, set aside checkpoints that no longer count, write config.yaml; the first rank calls this.

    Raises:
        ConfigError: run_dir cannot be written.
        NoProgressError, StopRequestedError: see `require_progress`.
    """
    note = run.run_dir / NOTE
    noted_before = note.exists()
    try:
        require_progress(run.run_dir, state.step)
        for folder in state.damaged:
            pointer.set_aside(folder, "damaged")
        for folder in pointer.whole_ones(run.run_dir / "checkpoints"):
            if (pointer.step_of(folder) or 0) > state.step:  # the pointer was set back by hand
                warn(f"{folder.name} is newer than what is resumed: kept as {folder.name}.superseded.")
                pointer.set_aside(folder, "superseded")
        write_text(run.run_dir / "config.yaml", to_yaml(run.config))
    except OSError as error:
        if not noted_before:
            note.unlink(missing_ok=True)
        raise ConfigError(
            f"run_dir={run.run_dir} cannot be written: {error.strerror or error}. Make room, or choose another."
        ) from error
