"""Which checkpoint of a run is the newest whole one? The one that `latest` names, or else the newest sound folder.

A checkpoint folder `step_00000010` gets this name only when it is whole (see `save`). The pointer `latest` names the
newest; it is replaced in one step, and when it is missing, empty or points to nothing, the folders themselves tell.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megalong.checkpoint.checksums import CHECKSUMS, Checksums
from megalong.checkpoint.committed import COMMIT_MARK, is_committed
from megalong.checkpoint.info import INFO
from megalong.runtime.console import warn
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import PARTIAL, partial_of, sync, write_text

POINTER = "latest"
RUN_CONFIG = "config.yaml"  # in checkpoints of a run, not in converted ones


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below `run_dir/checkpoints`."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint folder by its name; None for anything else."""
    match = re.fullmatch(r"step_([0-9]{8,18})", folder.name)
    return int(match.group(1)) if match else None


def whole_ones(root: Path) -> list[Path]:
    """All whole checkpoints below `root`, oldest first."""
    found = [p for p in root.glob("step_*") if step_of(p) is not None and is_committed(p)] if root.is_dir() else []
    return sorted(found, key=lambda p: step_of(p) or 0)


def newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest sound one with a warning; None where there is none."""
    name = _pointed_to(root)
    whole = whole_ones(root)
    named = [root / name] if name and root / name in whole else []
    for folder in [*named, *(p for p in reversed(whole) if p not in named)]:
        wrong = _damage(folder)
        if wrong is None:
            if name is not None and folder not in named:
                what = f"names {name[:80]!r}, which is not a sound checkpoint" if name else "is empty or no text"
                warn(f"{root / POINTER} {what}; falling back to {folder.name}.")
            return folder
        warn(f"{wrong} Not used.")
    return None


def _pointed_to(root: Path) -> str | None:
    """What `latest` says; empty where it cannot be read, None where there is none."""
    try:
        return (root / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ""


def _damage(folder: Path) -> str | None:
    """What is wrong with the records that are read before the tensors are; None: nothing."""
    try:
        checksums = Checksums(folder)
        if checksums.sums is None:
            return f"{folder / CHECKSUMS} is missing, which every checkpoint of a run has: damaged."
        for name in (RUN_CONFIG, INFO, COMMIT_MARK):
            checksums.check(name)
    except CheckpointError as error:
        return str(error)
    return None


def older(root: Path, folder: Path) -> Path | None:
    """The newest sound checkpoint of an earlier step than `folder`'s."""
    step = step_of(folder) or 0
    return next((p for p in reversed(whole_ones(root)) if (step_of(p) or 0) < step and _damage(p) is None), None)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing loads or prunes it: `step_00000010.<why>`, or `.<why>.2` and so on where that
    is taken; returns the new path.

    Raises:
        CheckpointError: it cannot be renamed.
    """
    target, number = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{why}.{number}")
    try:
        os.rename(folder, target)
        sync(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be renamed to {target.name}: {error.strerror}.") from error
    return target


def point_to(root: Path, folder: Path) -> None:
    """Make `latest` name a whole checkpoint."""
    assert is_committed(folder), folder
    write_text(root / POINTER, folder.name + "\n")


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: the folder itself, or the newest one of a run_dir.

    Raises:
        CheckpointError: there is nothing, or only half-written ones.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder. Give a checkpoint folder or the run_dir of a run.")
    if is_committed(path):
        return path
    for root in (path / "checkpoints", path):
        found = newest(root)
        if found is not None:
            return found
    if (path / COMMIT_MARK).is_file() or any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path} is a half-written checkpoint or not one of megalong's: metadata.json or megalong.json is missing. "
            "Use an older step, or convert it again."
        )
    halves = [p.name for p in (path / "checkpoints").glob(f"*{PARTIAL}")]
    left = f" (only half-written: {', '.join(halves)})" if halves else ""
    raise CheckpointError(f"{path} holds no whole checkpoint{left}. Expected metadata.json and megalong.json.")


def prune(root: Path, keep: int, permanent: Path | None = None) -> list[Path]:
    """Remove all but the `keep` newest whole checkpoints, and what interrupted saves left; returns what went.

    One that cannot be removed (files that are open elsewhere on NFS, a read-only disk) is a warning; it is tried again
    the next time, and looks whole only as long as all of it is there.
    """
    whole = whole_ones(root)
    left = sorted(root.glob(f"step_*{PARTIAL}"))
    return [p for p in (*left, *whole[: max(0, len(whole) - keep)]) if p != permanent and _removed(p)]


def _removed(folder: Path) -> bool:
    going = folder
    try:
        if folder.suffix != PARTIAL:
            going = partial_of(folder)  # in one step it no longer looks whole, and the next time knows it
            os.rename(folder, going)
        shutil.rmtree(going)
    except OSError as error:
        shutil.rmtree(going, ignore_errors=True)  # the files that can go, do
        warn(f"{folder} cannot be removed: {error}. It is tried again after the next save; the run goes on.")
        return False
    return True
