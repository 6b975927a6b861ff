"""Whose is a run_dir while a run lives? Held from before anything in it is read until the process has gone.

What a run resumes from is decided from its run_dir; a second run that decided while the first was still training would
take an older checkpoint and set the first one's later ones aside.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

from megalong.runtime.errors import ConfigError
from megalong.runtime.files import LOCK, hold


class RunClaim:
    """This process's claim on a run_dir; a kill ends it too.

    Args:
        run_dir: made if it is not there.

    Raises:
        ConfigError: another run holds it, or it cannot be made or written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        try:
            file = hold(run_dir)
        except OSError as error:
            raise ConfigError(
                f"run_dir={run_dir} cannot be used as a folder to write to: {error.strerror or error} "
                f"({error.filename}). Choose another run_dir."
            ) from error
        if file is None:
            raise ConfigError(f"run_dir={run_dir} is in use by another run. Wait for it, or choose another run_dir.")
        self._file: IO[str] = file

    def release(self) -> None:
        """The run is over."""
        self._file.close()

    def withdraw(self) -> None:
        """The run ends without success: leave no trace where nothing was before and nothing was written."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if self._made and [p.name for p in self.run_dir.iterdir()] == [LOCK]:
                (self.run_dir / LOCK).unlink()
                for folder in self._made:
                    folder.rmdir()
        self.release()
