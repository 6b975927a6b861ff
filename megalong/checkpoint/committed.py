"""When is a checkpoint folder whole? When it has `metadata.json`, which megatron-core writes last, and our record."""

from __future__ import annotations

from pathlib import Path

from megalong.checkpoint.info import INFO
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import read_json, shown

COMMIT_MARK = "metadata.json"


def is_committed(folder: Path) -> bool:
    """Whether megatron's commit mark and our record are there."""
    return (folder / COMMIT_MARK).is_file() and (folder / INFO).is_file()


def check_backend(folder: Path) -> None:
    """Check that a folder is a whole checkpoint in the `torch_dist` format.

    Raises:
        CheckpointError: it is not.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    path = folder / COMMIT_MARK
    if not path.exists():
        raise CheckpointError(
            f"{folder} is a half-written checkpoint, or none: {COMMIT_MARK}, which is written last, is missing."
        )
    backend = read_json(path, CheckpointError, "Use an older step.").get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} has the sharded backend {shown(backend)}; only torch_dist is read.")
