"""Whatever lies where a tensor's record should, it is the tensor that was written, or one message."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.checkpoint.torch_record import Record, find_record
from megalong.runtime.errors import CheckpointError
from tests.hostile import damaged, read_or_refused

TENSOR = torch.arange(12.0).view(3, 4)


def saved(value: Any = TENSOR) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def find(data: bytes, length: int | None = None) -> Record:
    return find_record(lambda at, count: data[at : at + count], 0, len(data) if length is None else length)


def archive(description: bytes, compression: int = zipfile.ZIP_STORED, name: str = "archive/data/0") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data.pkl", description)
        file.writestr(name, TENSOR.numpy().tobytes())
    return stream.getvalue()


class Reference:
    """Pickles as a call of any name with any arguments."""

    def __init__(self, storage: Any, *arguments: Any) -> None:
        self.storage, self.arguments = storage, arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (Persistent(self.storage), *self.arguments)


class Persistent:
    def __init__(self, value: Any) -> None:
        self.value = value


class Describer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.value if isinstance(obj, Persistent) else None


def described(storage: Any = None, start: Any = 0, shape: Any = (3, 4), stride: Any = (4, 1)) -> bytes:
    stream = io.BytesIO()
    storage = ("storage", torch.FloatStorage, "0", "cpu", 12) if storage is None else storage
    Describer(stream, 2).dump(Reference(storage, start, shape, stride, False, None))
    return stream.getvalue()


@settings(max_examples=300, deadline=None)
@given(data=damaged(saved()))
def test_any_change_of_a_record_is_found_or_its_checksum_tells(data):
    record, refused = read_or_refused(lambda: find(data))
    if not refused:
        assert (record.dtype, record.nbytes, record.shape) == (torch.float32, 48, (3, 4))
        content = data[record.offset : record.offset + record.nbytes]
        assert content == TENSOR.numpy().tobytes() or record.crc != zlib.crc32(content)


ANYTHING = st.recursive(
    st.none() | st.integers() | st.sampled_from([2**63, -(2**70), 1.5, "0", b"", torch.float32]),
    lambda v: st.tuples(v) | st.tuples(v, v) | st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=2), v),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(field=st.sampled_from(["storage", "start", "shape", "stride"]), value=ANYTHING)
def test_a_description_of_any_other_values_is_refused(field, value):
    record, refused = read_or_refused(lambda: find(archive(described(**{field: value}))))
    assert refused or record == find(archive(described()))


DESCRIPTIONS: dict[str, bytes] = {
    "negative sizes": described(shape=(-3, -4)),
    "huge sizes": described(shape=(2**62, 2**62)),
    "huger sizes": described(shape=(2**70,), stride=(1,)),
    "sizes that are bools": described(shape=(True, 12)),
    "sizes that are a list": described(shape=[3, 4]),
    "a thousand axes": described(shape=(1,) * 1000, stride=(1,) * 1000),
    "fewer strides": described(stride=(4,)),
    "negative strides": described(stride=(-4, -1)),
    "a negative start": described(start=-1),
    "a later start": described(start=1),
    "no storage": described(storage=(1, 2)),
    "a storage of no type": described(storage=("storage", "FloatStorage", "0", "cpu", 12)),
    "a storage of no name": described(storage=("storage", torch.FloatStorage, None, "cpu", 12)),
    "another member": described(storage=("storage", torch.FloatStorage, "../../etc/passwd", "cpu", 12)),
    "integers": described(storage=("storage", torch.IntStorage, "0", "cpu", 12)),
    "a number": pickle.dumps(3),
    "nothing": b"",
    "an end": b".",
    "lists in lists": b"(" * 100_000 + b"l" * 100_000 + b".",
    "a long memory": b"r\xff\xff\xff\x7f.",
    "a long text": b"\x8d" + struct.pack("<Q", 2**62) + b".",
    "an attribute of a name": b"ctorch._utils\n_rebuild_tensor_v2\n}U\x01aK\x01sb.",
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_a_hostile_description_is_one_message(name):
    with pytest.raises(CheckpointError, match=r"record at byte 0"):
        find(archive(DESCRIPTIONS[name]))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_record_is_refused(compression):
    with pytest.raises(CheckpointError, match="is compressed or encrypted"):
        find(archive(described(), compression))


def test_an_encrypted_a_doubled_and_a_nameless_member_are_refused():
    data = bytearray(archive(described()))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        find(bytes(data))
    with pytest.raises(CheckpointError, match="there twice"):
        find(archive(described(), name="other/data.pkl"))
    with pytest.raises(CheckpointError, match="data/0 is missing"):
        find(archive(described(), name="nowhere"))


def test_a_record_longer_than_its_place_is_refused():
    data = saved()
    with pytest.raises(CheckpointError, match="record at byte 0"):
        find(data, len(data) - 1)
    with pytest.raises(CheckpointError, match="record at byte 0"):
        find(data, 0)
