"""How are slices of large files read without mapping them, and without waiting for the disk?

`pread` into the caller's memory: a memory map would count against the resident memory of the process, and fault page
by page. A thread asks the kernel for what lies ahead of the last read, so that the disk works while the bytes at hand
are rearranged and hashed; bringing pages in is a good part of the cost of reading, and it happens on that thread.
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


class SliceReader:
    """Reads slices of the files of one folder.

    Args:
        folder: the folder that file names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[str, int] = {}
        self._asked: dict[str, int] = {}
        self._wishes: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()
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
        if end <= asked - _AHEAD + _STEP and end > asked - 2 * _AHEAD:
            return
        start = asked if asked - 2 * _AHEAD < end <= asked else end
        self._asked[name] = end + _AHEAD
        if self._thread is None:
            self._thread = threading.Thread(target=self._ask, name="read-ahead", daemon=True)
            self._thread.start()
        self._wishes.put((handle, start, end + _AHEAD - start))

    def _ask(self) -> None:
        while (wish := self._wishes.get()) is not None:
            with contextlib.suppress(OSError):  # only advice
                os.posix_fadvise(*wish, os.POSIX_FADV_WILLNEED)
