"""How does a file or folder come to exist only when it is whole? Written aside, synced, renamed, synced again."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import IO

PARTIAL = ".partial"
LOCK = ".lock"


def partial_of(target: Path) -> Path:
    """Where `target` is written until it is whole."""
    return target.with_name(target.name + PARTIAL)


def sync(path: Path) -> None:
    """Flush a file's contents, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(target: Path, text: str) -> None:
    """Replace a small file in one step: readers, and a crash, see the old text or the new one."""
    aside = partial_of(target)
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    os.replace(aside, target)
    sync(target.parent)


def fresh_folder(path: Path) -> None:
    """An empty folder at `path`, a name that only this program gives; what an interrupted writer left there goes.

    Raises:
        OSError: what is there cannot be removed; the text names it.
    """
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        what = f"{path} was left by an interrupted save and cannot be removed: {error}"
        raise OSError(error.errno, what) from error
    path.mkdir(parents=True)


def commit_folder(partial: Path, target: Path) -> None:
    """Give a completely written folder its final name: every file and folder in it is synced first."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    os.rename(partial, target)
    sync(target.parent)


def hold(folder: Path) -> IO[str] | None:
    """Make `folder` and claim it for this process; None when another live process holds it.

    Returns:
        the open lock file: the claim ends when it is closed or the process is gone, however it went.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = (folder / LOCK).open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        try:  # the holder before may have removed the file that was just locked
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
        file.close()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_size(run_dir: Path) -> int:
    """Bytes that a run's checkpoints take."""
    return sum(f.stat().st_size for f in (run_dir / "checkpoints").glob("step_*/**/*") if f.is_file())
