"""How does what is converted come to exist whole or not at all? Written under another name, given its own at last.

Everything is written into `OUT.partial` (`runtime.aside`), each file is hashed as it goes, synced, and listed in
`checksums.json`; one step then gives the directory its name. A kill leaves at most `OUT.partial`, which the next run
removes; an error removes it. Two conversions to the same place cannot run at the same time.

Bytes are gathered into aligned blocks; one thread hashes them, another writes them past the page cache (O_DIRECT),
while the next ones are read and rearranged. Handing pages to the cache would cost more than all the rest, and would
push out what the machine's other users keep there. The few blocks are reused, so memory does not grow with the model.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.checkpoint.checksums import write_checksums
from megalong.convert.replaceable import refuse_near, refuse_replacing
from megalong.runtime.aside import Aside, refuse_name
from megalong.runtime.errors import CheckpointError

_BLOCK = 16 << 20
_BLOCKS = 6
_ALIGNMENT = 4096  # of offsets, lengths and memory, for O_DIRECT
_SPARE = 16 << 20  # room for indices, tokenizers and the file system's own books
Progress = Callable[[int, int], None]
"""Called as bytes are written, with their number and with the total that is expected."""


class OutputFile:
    """One file of an output folder, written front to back.

    Args:
        size: bytes that it will have.
    """

    def __init__(self, folder: OutputFolder, name: str, size: int) -> None:
        self.name, self._folder, self._expected = name, folder, size
        self.size = 0
        """Bytes written so far."""
        self.hash = hashlib.sha256()
        self._block, self._filled = folder._take_block(), 0
        path = folder.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = _open_direct(path)
        folder._open.add(self.handle)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; they are copied, so their memory may be used again at once."""
        view = memoryview(data).cast("B")
        self.size += len(view)
        self._folder._progress(len(view), self._folder._needed)
        while view:
            count = min(len(view), _BLOCK - self._filled)
            self._block[self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == _BLOCK:
                self._folder._put(_Job(self, self._block, _BLOCK, is_last=False))
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
        overwrite: replace an existing directory that a conversion wrote.
        is_kind: whether an existing directory is of the kind that will be written.
        progress: follows the writing.
        source: what is converted, which the target must not touch.
        single: the target is one file, of the name that it is written by; there is no list of checksums then.

    Raises:
        CheckpointError: the target exists, someone else is writing it, or the disk is full.
    """

    def __init__(
        self,
        target: Path,
        needed: int,
        overwrite: bool = False,
        is_kind: Callable[[Path], bool] = lambda path: False,
        progress: Progress | None = None,
        source: Path | None = None,
        single: bool = False,
    ) -> None:
        self.target, self.source = target, source
        self._single = single
        self._aside = Aside(target, CheckpointError, single)
        self._progress: Progress = progress or (lambda count, total: None)
        self.sums: dict[str, dict[str, Any]] = {}
        self._needed, self._overwrite, self._is_kind = needed, overwrite, is_kind
        self._blocks: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._to_write: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._open: set[int] = set()

    @property
    def folder(self) -> Path:
        """Where the files are until the directory is whole."""
        return self._aside.folder

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
            self._blocks.put(memoryview(mmap.mmap(-1, _BLOCK)))  # page-aligned
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
                if not self._single:
                    # last of all files, so that even a copy of a half-written folder does not look whole
                    write_checksums(self.folder, self.sums)
        except OSError as failure:
            self._aside.discard()
            raise _as_user_error(failure, self.target) from failure
        except BaseException:
            self._aside.discard()
            raise
        if error is None:
            self._commit()
            return
        self._aside.discard()
        if isinstance(error, OSError):
            raise _as_user_error(error, self.target) from error

    def _claim(self) -> None:
        refuse_name(self.target, CheckpointError, self._single)
        exists = self.target.exists()
        old = self.target.with_name(self.target.name + ".replaced")
        if os.path.lexists(old) and not exists:
            raise CheckpointError(
                f"{old} is what {self.target.name} was before an older version was killed while replacing it. Rename "
                "it back, or remove it."
            )
        if self.source is not None:
            refuse_near(self.target, self.source)
        if exists and not self._overwrite:
            raise CheckpointError(f"{self.target} exists already. Choose another name, or give --overwrite.")
        if exists:
            self._refuse_replacing()
        self._aside.claim(replace=exists)
        free = shutil.disk_usage(self.folder).free
        if free < self._needed + _SPARE:
            self._aside.discard()
            raise CheckpointError(
                f"{self.target.parent} has {free / 1e9:.2f} GB free, but {self._needed / 1e9:.2f} GB will be written. "
                "Make room, or choose another disk."
            )

    def _refuse_replacing(self) -> None:
        if not self._single:
            refuse_replacing(self.target, self._is_kind)
        elif not self._is_kind(self.target):
            raise CheckpointError(
                f"{self.target} exists and is not what a conversion wrote. --overwrite does not remove it. Remove "
                "it yourself, or choose another name."
            )

    def _commit(self) -> None:
        try:
            if self._overwrite and self.target.exists():
                self._refuse_replacing()  # hours later: is it still only ours?
        except CheckpointError as error:
            self._aside.keep()
            raise CheckpointError(f"{error} The result is whole and lies in {self.folder}: move it.") from error
        self._aside.commit()

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
            if not self._single:
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


def _as_user_error(error: OSError, target: Path) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"the disk of {target} is full; nothing was left there. Make room and run again.")
    return CheckpointError(f"{target} cannot be written: {error}.")
