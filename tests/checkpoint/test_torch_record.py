"""A tensor's record is what torch.save writes: torch reads it, and what torch wrote is found without loading it."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.checkpoint.torch_record import RecordWriter, find_record
from megalong.runtime.errors import CheckpointError

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def find(data: bytes, offset: int, length: int):
    return find_record(lambda at, count: data[at : at + count], offset, length)


@settings(max_examples=40, deadline=None)
@given(dtype=DTYPES, shape=SHAPES, zip64_from=st.sampled_from([0, 0xFFFFFFFF]))
def test_torch_reads_what_is_written(tmp_path_factory, dtype, shape, zip64_from):
    tensor = torch.randn(shape).to(dtype)
    record = RecordWriter(dtype, shape, zip64_from)
    data = record.head + raw(tensor) + record.tail(zlib.crc32(raw(tensor)))
    assert len(data) == record.length
    assert len(record.head) % 64 == 0
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    path = Path(tmp_path_factory.getbasetemp()) / "record.pt"
    path.write_bytes(data)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert loaded.dtype == dtype
        assert torch.equal(loaded, tensor)


@settings(max_examples=40, deadline=None)
@given(dtype=DTYPES, shape=SHAPES, before=st.integers(0, 50))
def test_what_torch_wrote_is_found(dtype, shape, before):
    tensor = torch.randn(shape).to(dtype)
    stream = io.BytesIO()
    torch.save(tensor, stream)
    data = b"x" * before + stream.getvalue()
    record = find(data, before, len(data) - before)
    assert (record.dtype, record.shape, record.nbytes) == (dtype, shape, len(raw(tensor)))
    assert data[record.offset : record.offset + record.nbytes] == raw(tensor)
    assert record.crc == zlib.crc32(raw(tensor))


def test_the_stride_of_a_single_row_does_not_matter():
    stream = io.BytesIO()
    torch.save(torch.as_strided(torch.arange(5.0), (1, 5), (99, 1)), stream)
    assert find(stream.getvalue(), 0, len(stream.getvalue())).shape == (1, 5)


@pytest.mark.parametrize(
    "value",
    [[None], {"a": torch.zeros(2)}, torch.zeros(3, dtype=torch.int64), torch.zeros(4, 5).t(), torch.zeros(9)[3:]],
    ids=["no tensor", "several", "integers", "transposed", "a view"],
)
def test_anything_but_one_contiguous_float_tensor_is_refused(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    with pytest.raises(CheckpointError, match=r"record at byte 0"):
        find(stream.getvalue(), 0, len(stream.getvalue()))


def test_a_pickle_that_would_run_code_is_refused():
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"os\.system is not part of a float tensor"):
        find(stream.getvalue(), 0, len(stream.getvalue()))
