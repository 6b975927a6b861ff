"""A small disk of its own for tests that fill it or take away the right to write."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[Path]:
    """A tmpfs of a size, mounted at `path`; skips where that is not allowed."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "megalong-test", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=False)


def make_read_only(path: Path, yes: bool = True) -> None:
    """Remount a small disk read-only, or writable again."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(path)], check=True)


def fill(path: Path, leave_mebibytes: int) -> Path:
    """Fill a disk except for some MiB; returns the file that does."""
    import shutil

    filler = path / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(path).free - leave_mebibytes * 2**20))
    return filler
