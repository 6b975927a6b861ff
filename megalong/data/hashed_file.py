"""A large file is hashed and sent to the disk by a thread while it is still being written, and not read again."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

AT_ONCE = 4 * 2**20
"""Bytes that are written and hashed at a time; what is smaller is put together."""
SYNC = 64 * 2**20
"""Bytes after which the disk is given what was written: the last of them is then all that is waited for."""
BEHIND = 3
"""Calls that the thread may be behind: bounds what is held in memory."""


class HashedFile:
    """A file that is only ever appended to.

    Args:
        path: to make.

    Raises:
        OSError: also later, for what was written before.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="megalong-hash")
        self._waiting: deque[Future[Any]] = deque()
        self._small: list[memoryview] = []
        self._held = self._unsynced = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, or those of a contiguous array, which must not change any more."""
        self._small.append(memoryview(data).cast("B"))
        self._held += len(self._small[-1])
        if self._held >= AT_ONCE:
            self._append()

    def close(self) -> str:
        """Finish the file; the SHA-256 of all of it, in hexadecimal."""
        self._append()
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._file.close()
            self._thread.shutdown()
        return self._digest.hexdigest()

    def _append(self) -> None:
        if not self._held:
            return
        block = self._small[0] if len(self._small) == 1 else memoryview(b"".join(self._small))
        left = block
        while left:
            left = left[self._file.write(left) :]
        self.bytes += self._held
        self._unsynced += self._held
        self._small, self._held = [], 0
        self._later(self._digest.update, block)
        if self._unsynced >= SYNC:
            self._unsynced = 0
            self._later(os.fdatasync, self._file.fileno())

    def _later(self, function: Any, argument: Any) -> None:
        self._waiting.append(self._thread.submit(function, argument))
        if len(self._waiting) > BEHIND:
            self._waiting.popleft().result()
