"""How do a run's records reach the disk without ever ending the run? Appended whole, kept until there is room.

A disk that is full, read-only or away for an hour costs one warning: what could not be written waits, and is written
with the next record. A file never holds half a record, so a reader, or the resume, never meets one.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_BLOB_SEQUENCE,
    DATA_CLASS_SCALAR,
    Summary,
    SummaryMetadata,
)
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar import metadata as scalar
from tensorboard.plugins.text import metadata as text
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from megalong.runtime.console import say, warn

METRICS = "metrics.jsonl"
"""A run's steps, one object per line, in run_dir."""


class Appender:
    """Appends records to a file, each whole or not at all.

    Args:
        path: the file; made, with its folder, when the first record is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[bytes] = []
        self._failed = False

    def add(self, record: bytes) -> None:
        """Take a record; `flush` writes it."""
        self._waiting.append(record)

    def flush(self) -> bool:
        """Write what waits; on an error it goes on waiting, with one warning. Returns whether nothing waits."""
        if not self._waiting:
            return True
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            if not self._failed:
                warn(
                    f"{self.path} cannot be written ({error.strerror or error}). Training goes on; its records are "
                    "kept in memory and written when that is possible again."
                )
            self._failed = True
            return False
        self._waiting.clear()
        if self._failed:
            say(f"{self.path} can be written again; nothing of it is missing")
            self._failed = False
        return True

    def _append(self, data: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # opened anew each time: a file system that was unmounted meanwhile is found again
        with self.path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError("there was room for a part of it only")
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise

    def close(self) -> None:
        """The last attempt to write; what is lost then is said."""
        if not self.flush():
            warn(f"{len(self._waiting)} records of {self.path} are lost with the end of the run.")


class JsonLines:
    """One JSON object per line; numbers that are not finite, which JSON does not have, become null."""

    def __init__(self, path: Path) -> None:
        self._appender = Appender(path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one object."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._appender.add((json.dumps(clean, allow_nan=False) + "\n").encode())
        self._appender.flush()

    def close(self) -> None:
        """Write what waits, if that is possible by now."""
        self._appender.close()


class EventFile:
    """A TensorBoard event file (records as tensorboard/summary/writer/record_writer.py frames them).

    tensorboard's own writer hands records to a thread, raises that thread's error out of a later call, and then drops
    what it was given; a full disk would end the run.

    Args:
        folder: log folder.
        purge_step: TensorBoard forgets what earlier files say of this step and later ones (a run that was resumed).
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._appender = Appender(folder / name)
        self._described: set[str] = set()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int, description: str = "") -> None:
        """A point of a curve; of its descriptions TensorBoard reads the first."""
        about = None
        if tag not in self._described:
            about = scalar.create_summary_metadata(display_name="", description=description)
            about.data_class = DATA_CLASS_SCALAR  # else tensorboard's data server drops the description
            self._described.add(tag)
        # no tensor, which would say the same: TensorBoard, its EventAccumulator and W&B all read this
        self.add(Summary(value=[Summary.Value(tag=tag, simple_value=value, metadata=about)]), step)

    def add_text(self, tag: str, markdown: str, step: int, description: str = "") -> None:
        """A text."""
        self.add_tensor(tag, markdown.encode(), step, text.create_summary_metadata(None, description))

    def add_png(self, tag: str, png: bytes, step: int, description: str = "") -> None:
        """A picture."""
        # a PNG begins with its mark and the header chunk: width and height are bytes 16 to 24 (RFC 2083, 3.2)
        width, height = struct.unpack(">II", png[16:24])
        about = image.create_summary_metadata(display_name="", description=description)
        about.data_class = DATA_CLASS_BLOB_SEQUENCE
        shown = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self.add(Summary(value=[Summary.Value(tag=tag, image=shown, metadata=about)]), step)

    def add_tensor(self, tag: str, value: bytes | TensorProto, step: int, about: SummaryMetadata) -> None:
        """What a plugin reads: a tensor, or one string, with the plugin's metadata."""
        tensor = value if isinstance(value, TensorProto) else make_tensor_proto(value, dtype=types_pb2.DT_STRING)
        self.add(Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=about)]), step)

    def add(self, summary: Summary, step: int) -> None:
        """Any summary."""
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        """Write what was added."""
        self._appender.flush()

    def close(self) -> None:
        """Write what waits, if that is possible by now."""
        self._appender.close()

    def _add(self, event: Event) -> None:
        framed = io.BytesIO()
        RecordWriter(framed).write(event.SerializeToString())
        self._appender.add(framed.getvalue())
