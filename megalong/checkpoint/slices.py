"""How are slices of large files read? With `pread` into the caller's memory; what has been read leaves the page cache.

A memory map would count against the resident memory of the process, and fault page by page. Pages that have been read
are given back: a conversion larger than the memory would otherwise push everything else out of the cache, and take
fresh pages, which are dear on virtual machines, instead of using the same ones again.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megalong.runtime.errors import CheckpointError

_KEPT = 256 << 20


class SliceReader:
    """Reads slices of the files of one folder.

    Args:
        folder: the folder that file names are relative to.
        give_back: let go of pages that have been read; not where other processes of the machine read them too.
    """

    def __init__(self, folder: Path, give_back: bool = True) -> None:
        self.folder, self._gives_back = folder, give_back
        self._handles: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) with a file's bytes from `offset` on.

        Raises:
            CheckpointError: the file is gone or too short.
        """
        handle = self._handle(name)
        done = 0
        while done < len(target):
            count = os.preadv(handle, [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.folder / name} ended while it was read: it was changed meanwhile.")
            done += count
        self._used[name] = self._used.get(name, 0) + done
        if self._used[name] > _KEPT:
            self._used[name] = 0
            self._give_back(handle)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a file from `offset` on."""
        target = bytearray(count)
        self.read_into(name, offset, memoryview(target))
        return bytes(target)

    def close(self) -> None:
        """Close the files."""
        for handle in self._handles.values():
            self._give_back(handle)
            os.close(handle)
        self._handles.clear()

    def _handle(self, name: str) -> int:
        if name not in self._handles:
            try:
                self._handles[name] = os.open(self.folder / name, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror}.") from error
        return self._handles[name]

    def _give_back(self, handle: int) -> None:
        if self._gives_back:
            with contextlib.suppress(OSError):  # only advice
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
