"""How does one tensor lie in a torch.distributed.checkpoint file? As a whole zip archive, as `torch.save` writes it.

It lies at a place that the checkpoint's `.metadata` names.
Writing here goes through `head` and `tail`, the bytes before and after the tensor's own, so that a tensor of any size
can be written as it comes. Reading finds the tensor's bytes, their checksum (CRC-32, part of the zip format), dtype
and shape without loading them (`torch_archive`).
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalong.checkpoint.torch_archive import Described, TorchArchive
from megalong.runtime.errors import CheckpointError

_ROOT = "archive"
_ALIGNMENT = 64  # torch aligns the bytes of a storage, so that a memory-mapped tensor is aligned
_FLAGS = 0x0808  # sizes and checksum follow the data; names are UTF-8
_ZIP64_FROM = 0xFFFFFFFF
_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage"}


@dataclass(frozen=True)
class Record:
    """Where the bytes of one saved tensor lie, and what they are."""

    offset: int
    """First byte of the tensor, counted from the start of the file."""
    nbytes: int
    crc: int
    """CRC-32 of the bytes, as the archive states it."""
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class _Member:
    name: str
    offset: int
    size: int
    crc: int
    extra: bytes


class RecordWriter:
    """The bytes around one tensor.

    Args:
        dtype: float32, bfloat16 or float16.
        shape: the tensor's shape; its bytes are those of a contiguous tensor.
        zip64_from: size from which 64-bit fields are written (lowered in tests).
    """

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], zip64_from: int = _ZIP64_FROM) -> None:
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._zip64 = self.nbytes >= zip64_from
        self._members: list[_Member] = []
        parts = [
            self._small("data.pkl", _describe(dtype, shape)),
            self._small("byteorder", b"little"),
            self._small("version", b"3\n"),
        ]
        start = sum(map(len, parts))
        name = f"{_ROOT}/data/0"
        zip64 = struct.pack("<HHQQ", 1, 16, 0, 0) if self._zip64 else b""
        bare = start + 30 + len(name) + len(zip64) + 4
        extra = zip64 + _padding(-bare % _ALIGNMENT)
        self._members.append(_Member(name, start, self.nbytes, 0, extra))
        self.head = b"".join(parts) + self._local_header(name, extra, self._zip64)
        """Bytes before the tensor."""

    @property
    def length(self) -> int:
        """Bytes of the whole archive."""
        return len(self.head) + self.nbytes + len(self.tail(0))

    def tail(self, crc: int) -> bytes:
        """Bytes after the tensor.

        Args:
            crc: CRC-32 of the tensor's bytes.
        """
        data = self._members[-1]
        data.crc = crc
        descriptor = struct.pack("<IIQQ" if self._zip64 else "<IIII", 0x08074B50, crc, self.nbytes, self.nbytes)
        start = len(self.head) + self.nbytes + len(descriptor)
        directory = b"".join(self._central_header(member) for member in self._members)
        return descriptor + directory + self._end(start, len(directory))

    def _small(self, name: str, content: bytes) -> bytes:
        name = f"{_ROOT}/{name}"
        offset = sum(30 + len(m.name) + len(m.extra) + m.size + 16 for m in self._members)
        crc = zlib.crc32(content)
        self._members.append(_Member(name, offset, len(content), crc, b""))
        descriptor = struct.pack("<IIII", 0x08074B50, crc, len(content), len(content))
        return self._local_header(name, b"", False) + content + descriptor

    def _local_header(self, name: str, extra: bytes, zip64: bool) -> bytes:
        size = 0xFFFFFFFF if zip64 else 0
        version = 45 if zip64 else 20
        fields = (0x04034B50, version, _FLAGS, 0, 0, 33, 0, size, size, len(name), len(extra))
        return struct.pack("<IHHHHHIIIHH", *fields) + name.encode() + extra

    def _central_header(self, member: _Member) -> bytes:
        zip64 = self._zip64 and member is self._members[-1]
        size = 0xFFFFFFFF if zip64 else member.size
        extra = struct.pack("<HHQQ", 1, 16, member.size, member.size) if zip64 else b""
        version = 45 if zip64 else 20
        fields = (0x02014B50, version, version, _FLAGS, 0, 0, 33, member.crc, size, size)
        tail = (len(member.name), len(extra), 0, 0, 0, 0, member.offset)
        return struct.pack("<IHHHHHHIIIHHHHHII", *fields, *tail) + member.name.encode() + extra

    def _end(self, start: int, size: int) -> bytes:
        count = len(self._members)
        if not self._zip64:
            return struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, start, 0)
        wide = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
        locator = struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
        return wide + locator + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, 0xFFFFFFFF, 0)


def _padding(size: int) -> bytes:
    return struct.pack("<HH", 0x4246, size) + b"Z" * size  # extra field "FB", as torch pads


def find_record(read: Callable[[int, int], bytes], offset: int, length: int) -> Record:
    """Find the tensor in an archive that `torch.save` or `RecordWriter` wrote.

    Args:
        read: returns `count` bytes of the file, given offset and count.
        offset: first byte of the archive in the file.
        length: bytes of the archive.

    Raises:
        CheckpointError: the archive is damaged, or holds anything but one contiguous tensor.
    """
    try:
        archive = TorchArchive(read, offset, length)
        tensor = archive.content
        if not isinstance(tensor, Described) or tensor.dtype not in _STORAGES:
            raise ValueError("it is not part of a float tensor")
        place = archive.bytes_of(tensor)
    except ValueError as error:
        raise CheckpointError(f"the record at byte {offset} is damaged: {error}") from error
    nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
    if not tensor.is_contiguous or place.nbytes != nbytes:
        raise CheckpointError(
            f"the record at byte {offset} does not hold one contiguous tensor of shape {list(tensor.shape)}"
        )
    return Record(place.offset, nbytes, place.crc, tensor.dtype, tensor.shape)


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """`data.pkl` of a contiguous tensor, as `torch.save` writes it (protocol 2)."""
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    class Tensor:
        def __reduce__(self) -> tuple:
            numel = math.prod(shape)
            storage = ("storage", getattr(torch, _STORAGES[dtype]), "0", "cpu", numel)
            arguments: tuple = (_Persistent(storage), 0, shape, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    stream = io.BytesIO()
    _Describer(stream, protocol=2).dump(Tensor())
    return stream.getvalue()


@dataclass(frozen=True)
class _Persistent:
    value: tuple


class _Describer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.value if isinstance(obj, _Persistent) else None
