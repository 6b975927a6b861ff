"""Documents are read from JSON lines, plain or compressed, as a stream with no line longer than the limit.

A plain file may be read from one byte to another: a line belongs to the part in which it begins.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from zstandard import ZstdDecompressor, ZstdError

from megalong.data.pipeline.documents import Document, Fields, found_in
from megalong.data.pipeline.faults import CUT, Fault

CHUNK = 2**20
ZSTD_CHUNK = 2048
"""Compressed bytes at a time: a run of one character unpacks to 32,768 times its size."""
ESCAPED = 6
"""A character takes at most so many bytes of JSON for one of UTF-8 (`\\u0041`)."""


def read_lines(
    path: Path, fields: Fields, start: int = 0, stop: int | None = None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Document | Fault]:
    """The documents of a .jsonl, .jsonl.gz or .jsonl.zst.

    Args:
        start, stop: bytes of a plain file between which lines begin.
        on_bytes: called with the bytes of the file (compressed ones) that were read so far.

    Raises:
        OSError: the file cannot be read.
    """
    told = on_bytes or (lambda count: None)
    with path.open("rb") as raw:
        stream = _unpacked(path, raw)
        if start:
            raw.seek(start - 1)
            _skip_line(stream)
        position = stream.tell() if stop is not None else 0
        number = 0
        try:
            while stop is None or position < stop:
                line, size = _bounded(stream, ESCAPED * fields.limit + 65536)
                if not size:
                    break
                number += 1
                where = f"{path}:{number}" if not start else f"{path} at byte {position}"
                position += size
                if line is None:
                    yield Fault("too_large", where)
                elif not line.isspace():
                    yield _document(line, fields, where)
                if number % 64 == 0:
                    told(raw.tell())
        except (EOFError, ZstdError, zlib.error, gzip.BadGzipFile) as error:
            yield Fault(CUT, f"{path} after line {number}: {' '.join(str(error).split())[:200]}")
        told(raw.tell())


def _document(line: bytes, fields: Fields, where: str) -> Document | Fault:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return Fault("bad_utf8", where)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return Fault("bad_json", where)
    if not isinstance(values, dict):
        return Fault("bad_json", where)
    found = found_in(values, fields, where)
    if isinstance(found, Document) and b"\\u" in line and not _is_whole(found):
        return Fault("bad_character", where)
    return found


def _is_whole(document: Document) -> bool:
    """Whether every surrogate found its pair: json puts those together that belong together."""
    try:
        for text in (document.text, document.source, document.join):
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bounded(stream: IO[bytes], limit: int) -> tuple[bytes | None, int]:
    """The next line (None if it has more than `limit` bytes, which are then passed over), and its size."""
    line = stream.readline(limit + 1)
    size = len(line)
    if size <= limit or line.endswith(b"\n"):
        return line, size
    while (more := stream.readline(CHUNK)) and not more.endswith(b"\n"):
        size += len(more)
    return None, size + len(more)


def _skip_line(stream: IO[bytes]) -> None:
    while (more := stream.readline(CHUNK)) and not more.endswith(b"\n"):
        pass


def _unpacked(path: Path, raw: IO[bytes]) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(raw), CHUNK)
    return raw


class _Zstd(io.RawIOBase):
    """Frames of a .zst one after another; zstandard's own reader does not tell a file that was cut from a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def,override]
        while not self._ready:
            packed = self._raw.read(ZSTD_CHUNK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            self._ready = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        unpacked = []
        while packed:
            if self._frame is None:
                self._frame = ZstdDecompressor(max_window_size=2**31).decompressobj()
            unpacked.append(self._frame.decompress(packed))
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        return b"".join(unpacked)
