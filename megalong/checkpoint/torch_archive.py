"""What does an archive of `torch.save` hold, and where? Described tensors and their members; its pickle is not run.

The archive is a zip: `data.pkl` describes tensors, `data/0`, `data/1`, ... are their bytes, stored as they are; each
member has a CRC-32. Of the pickle only the few names are understood that `torch.save` itself writes for plain tensors;
whatever else it asks for is refused, not run. What is described is checked before anyone computes with it: sizes and
strides are counts, a member is not compressed, lies inside the archive and is there once.

Format: torch/serialization.py `_save`, caffe2/serialize/inline_container.cc, PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megalong.runtime.errors import UserError

_SMALL = 64_000_000  # bytes; the description of a model of 405B has a fraction of a million
_MOST_AXES = 8
_STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True)
class Described:
    """A tensor as `data.pkl` describes it: a view of a storage."""

    key: str
    """Member `data/<key>` holds the storage."""
    dtype: torch.dtype
    start: int
    """First element, counted from the start of the storage."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether elements follow one another from the start of the storage."""
        expected = (math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))
        strides = zip(self.shape, self.stride, expected, strict=True)
        return self.start == 0 and all(found == wanted for size, found, wanted in strides if size != 1)

    @property
    def end(self) -> int:
        """Elements of the storage up to the last one that the tensor reaches."""
        if 0 in self.shape:
            return 0
        return self.start + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Bytes:
    """Where the bytes of one storage lie."""

    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    crc: int
    """CRC-32 of the bytes, as the archive states it."""


class TorchArchive:
    """An archive, opened and checked.

    Args:
        read: returns `count` bytes of the file, given offset and count.
        offset: first byte of the archive in the file.
        length: bytes of the archive.

    Attributes:
        content: what was saved, with a `Described` for every tensor.

    Raises:
        ValueError: not an archive of plain tensors, or damaged; besides it only what `read` raises for a user.
    """

    def __init__(self, read: Callable[[int, int], bytes], offset: int, length: int) -> None:
        self._read, self._offset, self._length = read, offset, length
        try:
            self._open()
        except UserError:
            raise
        except Exception as error:  # zipfile and pickle raise whatever hostile bytes make them trip over
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _open(self) -> None:
        archive = zipfile.ZipFile(_Window(self._read, self._offset, self._length))
        self._members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if len(self._members) < len(archive.infolist()):
            raise ValueError("a member is there twice")
        for member in self._members.values():
            is_plain = member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1
            if not is_plain or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename} is compressed or encrypted, as torch.save does not write it")
        # torch before 2.1 did not state the byte order
        if "byteorder" in self._members and self._small(archive, "byteorder") != b"little":
            raise ValueError("bytes are not little-endian")
        self.content: Any = _Description(io.BytesIO(self._small(archive, "data.pkl"))).load()

    def _small(self, archive: zipfile.ZipFile, name: str) -> bytes:
        if self._members[name].file_size > _SMALL:
            raise ValueError(f"{name} has {self._members[name].file_size:,} bytes")
        return archive.read(self._members[name])

    def bytes_of(self, tensor: Described) -> Bytes:
        """Where the storage of a tensor lies.

        Raises:
            ValueError: nowhere in the archive, or it is too small for the tensor.
        """
        member = self._members.get(f"data/{tensor.key}")
        if member is None:
            raise ValueError(f"member data/{tensor.key[:20]} is missing")
        header = self._read(self._offset + member.header_offset, 30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"member data/{tensor.key[:20]} is not where the archive says")
        at = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if at + member.file_size > self._length:
            raise ValueError(f"member data/{tensor.key[:20]} ends outside of the archive")
        if member.file_size % tensor.dtype.itemsize or tensor.end * tensor.dtype.itemsize > member.file_size:
            raise ValueError(
                f"a tensor of {tensor.dtype}, shape {list(tensor.shape)}, stride {list(tensor.stride)} from element "
                f"{tensor.start} on does not fit in {member.file_size} bytes"
            )
        return Bytes(self._offset + at, member.file_size, member.CRC)


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


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_AXES:
        raise ValueError(f"a {type(values).__name__} instead of sizes")
    if not all(type(n) is int and 0 <= n < 2**63 for n in values):
        raise ValueError("sizes that are no counts")
    return tuple(values)


def _rebuild(storage: Any, start: Any, shape: Any, stride: Any, *_: Any) -> Described:
    (start,), shape, stride = _counts((start,)), _counts(shape), _counts(stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor of no storage, or of contradicting sizes")
    return Described(storage.key, storage.dtype, start, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Description(pickle.Unpickler):
    """Reads `data.pkl` as a plain description; any name that `torch.save` does not write for a tensor is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a float tensor")

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("a storage of no dtype or name")
        return _Storage(dtype, key)
