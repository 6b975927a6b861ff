"""How does one tensor lie in a torch.distributed.checkpoint file? As a whole zip archive of its own, as `torch.save`
writes it, at a place that the checkpoint's `.metadata` names.

Writing here goes through `head` and `tail`, the bytes before and after the tensor's own, so that a tensor of any size
can be written as it comes. Reading finds the tensor's bytes, their checksum (CRC-32, part of the zip format), dtype
and shape without loading them, and without running the pickle that describes them: only the few names that
`torch.save` itself writes are understood.

Format: torch/serialization.py `_save`, caffe2/serialize/inline_container.cc, PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalong.runtime.errors import CheckpointError

_ROOT = "archive"
_ALIGNMENT = 64  # torch aligns the bytes of a storage, so that a memory-mapped tensor is aligned
_FLAGS = 0x0808  # sizes and checksum follow the data; names are UTF-8
_ZIP64_FROM = 0xFFFFFFFF
_STORAGES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage", torch.float16: "HalfStorage"}
_DTYPES = {name: dtype for dtype, name in _STORAGES.items()}


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
        archive = zipfile.ZipFile(_Window(read, offset, length))
        names = {name.split("/", 1)[1]: name for name in archive.namelist()}
        if archive.read(names["byteorder"]) != b"little":
            raise ValueError("bytes are not little-endian")
        storage, start, shape, stride = _Description(io.BytesIO(archive.read(names["data.pkl"]))).load()
        member = archive.getinfo(names[f"data/{storage.key}"])
        header = read(offset + member.header_offset, 30)
        name_length, extra_length = struct.unpack("<HH", header[26:30])
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise CheckpointError(f"the record at byte {offset} is damaged: {type(error).__name__}: {error}") from error
    data = offset + member.header_offset + 30 + name_length + extra_length
    itemsize = storage.dtype.itemsize
    nbytes = math.prod(shape) * itemsize
    strides = zip(shape, stride, _contiguous(shape), strict=True)
    is_contiguous = all(found == expected for size, found, expected in strides if size != 1)
    if start != 0 or not is_contiguous or member.file_size != nbytes:
        raise CheckpointError(f"the record at byte {offset} does not hold one contiguous tensor of shape {list(shape)}")
    if header[:4] != b"PK\x03\x04" or data + nbytes > offset + length:
        raise CheckpointError(f"the record at byte {offset} is damaged: its data lies outside of it")
    return Record(data, nbytes, member.CRC, storage.dtype, tuple(shape))


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, read: Callable[[int, int], bytes], offset: int, length: int) -> None:
        self._read, self._offset, self._length, self._at = read, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        data = self._read(self._offset + self._at, count)
        self._at += len(data)
        return data


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _rebuild(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> tuple:
    return storage, offset, tuple(shape), tuple(stride)


class _Description(pickle.Unpickler):
    """Reads `data.pkl` as a plain description; any name that `torch.save` does not write for a tensor is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a float tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        return _Storage(dtype, key)


def _describe(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """`data.pkl` of a contiguous tensor, as `torch.save` writes it (protocol 2)."""

    class Tensor:
        def __reduce__(self) -> tuple:
            numel = math.prod(shape)
            storage = ("storage", getattr(torch, _STORAGES[dtype]), "0", "cpu", numel)
            arguments: tuple = (_Persistent(storage), 0, shape, _contiguous(shape), False, collections.OrderedDict())
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
