"""Which checkpoint of a run is the newest whole one?

A checkpoint folder `step_00000010` gets this name only when it is whole (see `store`). The pointer `latest` names the
newest; it is replaced in one step, and when it is missing, empty or points to nothing, the folders themselves tell.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from megalong.checkpoint.checksums import Checksums
from megalong.runtime.console import warn
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import PARTIAL, sync, write_text

POINTER = "latest"
COMMIT_MARK = "metadata.json"  # megatron-core writes it last


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies below `run_dir/checkpoints`."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step of a checkpoint folder by its name; None for anything else."""
    match = re.fullmatch(r"step_(\d{8,})", folder.name)
    return int(match.group(1)) if match else None


def is_whole(folder: Path) -> bool:
    """Whether megatron's commit mark and our record are there."""
    return (folder / COMMIT_MARK).is_file() and (folder / "megalong.json").is_file()


def whole_ones(root: Path) -> list[Path]:
    """All whole checkpoints below `root`, oldest first."""
    found = [p for p in root.glob("step_*") if step_of(p) is not None and is_whole(p)] if root.is_dir() else []
    return sorted(found, key=lambda p: step_of(p) or 0)


def newest(root: Path) -> Path | None:
    """The checkpoint that `latest` names, or the newest sound one with a warning; None where there is none."""
    pointer = root / POINTER
    name = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    whole = whole_ones(root)
    named = [root / name] if name and is_whole(root / name) else []
    for folder in [*named, *(p for p in reversed(whole) if p not in named)]:
        wrong = _damage(folder)
        if wrong is None:
            if pointer.exists() and folder not in named:
                what = f"names {name!r}, which is not a sound checkpoint" if name else "is empty"
                warn(f"{pointer} {what}; falling back to {folder.name}.")
            return folder
        warn(f"{wrong} Not used.")
    return None


def _damage(folder: Path) -> str | None:
    """What is wrong with the records that are read before the tensors are; None: nothing."""
    try:
        checksums = Checksums(folder)
        for name in ("config.yaml", "megalong.json", COMMIT_MARK):
            checksums.check(name)
    except CheckpointError as error:
        return str(error)
    return None


def older(root: Path, folder: Path) -> Path | None:
    """The newest sound checkpoint of an earlier step than `folder`'s."""
    step = step_of(folder) or 0
    return next((p for p in reversed(whole_ones(root)) if (step_of(p) or 0) < step and _damage(p) is None), None)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a checkpoint so that nothing loads or prunes it: `step_00000010.<why>`; returns the new path."""
    target = folder.with_name(f"{folder.name}.{why}")
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)
    sync(folder.parent)
    return target


def point_to(root: Path, folder: Path) -> None:
    """Make `latest` name a whole checkpoint."""
    assert is_whole(folder), folder
    write_text(root / POINTER, folder.name + "\n")


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: the folder itself, or the newest one of a run_dir.

    Raises:
        CheckpointError: there is nothing, or only half-written ones.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder. Give a checkpoint folder or the run_dir of a run.")
    if is_whole(path):
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
    """Remove all but the `keep` newest whole checkpoints, and what interrupted saves left; returns what went."""
    whole = whole_ones(root)
    gone = [p for p in whole[: max(0, len(whole) - keep)] if p != permanent] + list(root.glob(f"step_*{PARTIAL}"))
    for folder in gone:
        if is_whole(folder):
            (folder / COMMIT_MARK).unlink()  # first: a kill half-way leaves nothing that looks whole
        shutil.rmtree(folder)
    return gone
