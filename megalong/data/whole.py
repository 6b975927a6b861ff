"""How does a folder come to exist only when it is whole? Written under `<name>.partial`, synced, then renamed once."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalong.runtime.errors import DataError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a fresh `<target>.partial` to write into; on success it becomes `target`, on an error it is left behind.

    What an earlier, killed writer left under `<target>.partial` is removed first.

    Raises:
        DataError: `target` exists already.
    """
    if target.exists():
        raise DataError(f"{target} exists already; it is left as it is. Remove it or choose another folder.")
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.rglob("*"), partial):
        _sync(path)
    os.rename(partial, target)
    _sync(target.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal (what `sha256sum` prints)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
