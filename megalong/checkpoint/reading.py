"""How are slices of large files read without mapping them, and without waiting for the disk?

`pread` into the caller's memory: a memory map would count against the resident memory of the process, and fault page
by page. A thread asks the kernel for what lies ahead of the last read, so that the disk works while the bytes at hand
are rearranged and hashed; bringing pages in is a good part of the cost of reading, and it happens on that thread. Pages
that have been read are given back: a conversion larger than the memory would otherwise push everything else out of the
cache, and take fresh pages, which are dear on virtual machines, instead of using the same ones again.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from pathlib import Path

from megalong.runtime.errors import CheckpointError

_AHEAD = 64 << 20
_STEP = 16 << 20
_KEPT = 256 << 20


class SliceReader:
    """Reads slices of the files of one folder.

    Args:
        folder: the folder that file names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._used: dict[str, int] = {}
        self._wishes: queue.SimpleQueue[tuple[int, int, int, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def read_into(self, name: str, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) with a file's bytes from `offset` on.

        Raises:
            CheckpointError: the file is gone or too short.
        """
        handle = self._handle(name)
        self._look_ahead(name, handle, offset + len(target))
        done = 0
        while done < len(target):
            count = os.preadv(handle, [target[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.folder / name} ended while it was read: it was changed meanwhile.")
            done += count
        self._give_back(name, handle, done)

    def read(self, name: str, offset: int, count: int) -> bytes:
        """`count` bytes of a file from `offset` on."""
        target = bytearray(count)
        self.read_into(name, offset, memoryview(target))
        return bytes(target)

    def close(self) -> None:
        """Close the files."""
        if self._thread is not None:
            self._wishes.put(None)
            self._thread.join()
            self._thread = None
        for handle in self._handles.values():
            with contextlib.suppress(OSError):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        self._handles.clear()
        self._asked.clear()

    def _handle(self, name: str) -> int:
        if name not in self._handles:
            try:
                self._handles[name] = os.open(self.folder / name, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror}.") from error
        return self._handles[name]

    def _look_ahead(self, name: str, handle: int, end: int) -> None:
        asked = self._asked.get(name, 0)
        if asked - 2 * _AHEAD < end <= asked - _AHEAD + _STEP:
            return
        start = asked if asked - 2 * _AHEAD < end <= asked else end
        self._asked[name] = end + _AHEAD
        self._wish(handle, start, end + _AHEAD - start, os.POSIX_FADV_WILLNEED)

    def _give_back(self, name: str, handle: int, count: int) -> None:
        self._used[name] = self._used.get(name, 0) + count
        if self._used[name] > _KEPT:
            self._used[name] = self._asked[name] = 0
            self._wish(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def _wish(self, *advice: int) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._advise, name="read-ahead", daemon=True)
            self._thread.start()
        self._wishes.put((advice[0], advice[1], advice[2], advice[3]))

    def _advise(self) -> None:
        while (wish := self._wishes.get()) is not None:
            with contextlib.suppress(OSError):  # only advice
                os.posix_fadvise(*wish)
