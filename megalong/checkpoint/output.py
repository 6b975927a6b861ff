"""How does a converted directory come to exist whole or not at all, however it ends?

Everything is written into `OUT.partial`, each file is hashed as it goes, synced, and listed in `checksums.json`; one
rename then gives the directory its name. A kill leaves at most `OUT.partial`, which the next run replaces; an error
removes it. Two conversions to the same place cannot run at the same time.

Bytes are gathered into aligned blocks; one thread hashes them, another writes them past the page cache (O_DIRECT),
while the next ones are read and rearranged. Handing pages to the cache would cost more than all the rest, and would
push out what the machine's other users keep there. The few blocks are reused, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.checkpoint.checksums import write_checksums
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import commit_folder, partial_of

BLOCK = 16 << 20
_BLOCKS = 6
_ALIGNMENT = 4096  # of offsets, lengths and memory, for O_DIRECT
_SPARE = 16 << 20  # room for indices, tokenizers and the file system's own books
_LIBC = ctypes.CDLL(None, use_errno=True)
Progress = Callable[[int, int], None]
"""Called as bytes are written, with their number and with the total that is expected."""


class OutputFile:
    """One file of an output folder, written front to back.

    Args:
        size: bytes that it will have; its place on the disk is reserved at once.
    """

    def __init__(self, folder: OutputFolder, name: str, size: int) -> None:
        self.name, self._folder, self._expected = name, folder, size
        self.size = 0
        """Bytes written so far."""
        self.hash = hashlib.sha256()
        self._block, self._filled = folder._take_block(), 0
        path = folder.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = _open_direct(path)
        folder._open.add(self.handle)
        _reserve(self.handle, size)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are copied, so their memory may be used again at once."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        self._folder._progress(len(view), self._folder._needed)
        while view:
            count = min(len(view), BLOCK - self._filled)
            self._block[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BLOCK:
                self._folder._put(_Job(self, self._block, BLOCK, is_last=False))
                self._block, self._filled = self._folder._take_block(), 0

    def close(self) -> None:
        """Write the rest, sync and close the file, and enter it in the list of checksums."""
        assert self.size == self._expected, (self.name, self.size, self._expected)
        self._folder._put(_Job(self, self._block, self._filled, is_last=True))


@dataclass(frozen=True)
class _Job:
    """Hash and write the first `count` bytes of a block; after the last ones the file is closed."""

    file: OutputFile
    block: memoryview
    count: int
    is_last: bool


class OutputFolder:
    """A directory that gets its name only when it is whole. Use as a context manager.

    Args:
        target: the final name.
        needed: bytes that will be written, to refuse a disk without room before anything is touched.
        overwrite: replace an existing directory of the same kind (`is_ours` says whether it is one).
        is_ours: whether an existing directory may be replaced at all.
        progress: follows the writing.

    Raises:
        CheckpointError: the target exists, someone else is writing it, or the disk is full.
    """

    def __init__(
        self,
        target: Path,
        needed: int,
        overwrite: bool = False,
        is_ours: Callable[[Path], bool] = lambda path: False,
        progress: Progress | None = None,
    ) -> None:
        self.target, self.partial = target, partial_of(target)
        self.replaced = target.with_name(target.name + ".replaced")
        self._progress: Progress = progress or (lambda count, total: None)
        self.sums: dict[str, dict[str, Any]] = {}
        self._needed, self._overwrite, self._is_ours = needed, overwrite, is_ours
        self._blocks: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._open: set[int] = set()
        self._lock = -1

    def file(self, name: str, size: int) -> OutputFile:
        """Start a file of `size` bytes."""
        return OutputFile(self, name, size)

    def small_file(self, name: str, content: bytes) -> None:
        """Write a whole small file."""
        file = self.file(name, len(content))
        file.write(content)
        file.close()

    def __enter__(self) -> OutputFolder:
        try:
            self._claim()
        except OSError as error:
            raise CheckpointError(f"{self.target} cannot be written: {error}.") from error
        for _ in range(_BLOCKS):
            self._blocks.put(memoryview(mmap.mmap(-1, BLOCK)))  # page-aligned
        self._threads = [
            threading.Thread(target=work, name=work.__name__, daemon=True)
            for work in (self._hash_jobs, self._write_jobs)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._to_hash.put(None)
            for thread in self._threads:
                thread.join()
            for handle in self._open:  # files that an error left unfinished
                os.close(handle)
            if error is None:
                self._check()
                self._commit()
        except OSError as failure:
            self._discard()
            raise _as_user_error(failure, self.target) from failure
        except BaseException:
            self._discard()
            raise
        else:
            if error is not None:
                self._discard()
        finally:
            os.close(self._lock)
        if isinstance(error, OSError):
            raise _as_user_error(error, self.target) from error

    def _claim(self) -> None:
        if self.replaced.exists() and not self.target.exists():
            os.rename(self.replaced, self.target)  # an overwrite was killed between its two renames
        if self.target.exists() and not self._overwrite:
            raise CheckpointError(f"{self.target} exists already. Choose another name, or give --overwrite.")
        if self.target.exists() and not (self._is_ours(self.target) or _is_empty(self.target)):
            raise CheckpointError(
                f"{self.target} exists and is not a checkpoint of this kind: --overwrite does not remove it."
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise CheckpointError(f"another conversion is writing {self.partial} right now.") from error
        for left in self.partial.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        free = shutil.disk_usage(self.partial).free
        if free < self._needed + _SPARE:
            self._discard()
            os.close(self._lock)
            raise CheckpointError(
                f"{self.target.parent} has {free / 1e9:.2f} GB free, but {self._needed / 1e9:.2f} GB will be written. "
                "Make room, or choose another disk."
            )

    def _commit(self) -> None:
        # last of all files, so that even a copy of a half-written folder does not look whole
        write_checksums(self.partial, self.sums)
        if self.target.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            os.rename(self.target, self.replaced)
        commit_folder(self.partial, self.target)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _discard(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    def _take_block(self) -> memoryview:
        """A block to fill; waits until the writer has given one back."""
        while True:
            self._check()
            with contextlib.suppress(queue.Empty):
                return self._blocks.get(timeout=1.0)

    def _put(self, job: _Job) -> None:
        self._check()
        self._to_hash.put(job)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _hash_jobs(self) -> None:
        while (job := self._to_hash.get()) is not None:
            file = job.file
            file.hash.update(job.block[: job.count])
            if job.is_last:
                self.sums[file.name] = {"bytes": file.size, "sha256": file.hash.hexdigest()}
            self._to_write.put(job)
        self._to_write.put(None)

    def _write_jobs(self) -> None:
        while (job := self._to_write.get()) is not None:
            try:
                if self._failure is None:
                    _write(job)
            except BaseException as error:
                self._failure = error
            self._blocks.put(job.block)
            if job.is_last:
                self._open.discard(job.file.handle)
                os.close(job.file.handle)


def _open_direct(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # the file is made before the flag is refused
        return os.open(path, flags, 0o644)  # a file system without direct access, such as an older tmpfs


def _reserve(handle: int, size: int) -> None:
    """Reserve a file's blocks, so that a full disk shows at once and the file lies in one piece.

    fallocate(2) itself rather than `os.posix_fallocate`: where a file system has no such call, the C library would
    write every block once more. There, writing simply goes on without.
    """
    if size and _LIBC.fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(code, os.strerror(code))


def _write(job: _Job) -> None:
    """Write a block in whole aligned pieces; what the last of them is too long is cut off again."""
    padded = -(-job.count // _ALIGNMENT) * _ALIGNMENT
    job.block[job.count : padded] = bytes(padded - job.count)
    _write_all(job.file.handle, job.block[:padded])
    if job.is_last:
        os.ftruncate(job.file.handle, job.file.size)
        os.fsync(job.file.handle)


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def _as_user_error(error: OSError, target: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"the disk of {target} is full; nothing was left there. Make room and run again.")
    return CheckpointError(f"{target} cannot be written: {error}.")


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of the pieces in which a tensor passes through blocks.

    A row longer than a block (none exists in a Llama: 16 MiB is 4 million columns of fp32) is an assertion.
    """
    assert row_bytes <= BLOCK, row_bytes
    step = max(1, BLOCK // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
