"""Whatever a safetensors directory holds, it reads as the reference implementation reads it, or ends in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from megalong.convert.safetensors_dir import INDEX, SINGLE, SafetensorsDirectory
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import shown
from tests.hostile import RAW, as_bytes, damaged, mutated, read_or_refused
from tests.llamas import hf_config, save_hf

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).bfloat16(), "empty": torch.ones(0, 5)}
BYTES = save(TENSORS, {"format": "pt"})
LENGTH = int.from_bytes(BYTES[:8], "little")
HEADER, DATA = json.loads(BYTES[8 : 8 + LENGTH]), BYTES[8 + LENGTH :]
INDEXED = {"metadata": {"total_size": 32}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


def file_of(header: Any) -> bytes:
    text = as_bytes(header)
    return len(text).to_bytes(8, "little") + text + DATA


def read(folder: Path, content: bytes) -> dict[str, torch.Tensor]:
    (folder / SINGLE).write_bytes(content)
    with SafetensorsDirectory(folder) as source:
        return {
            name: source.rows(name, 0, stored.shape[0] if stored.shape else 1)
            for name, stored in source.tensors.items()
        }


@settings(max_examples=300, deadline=None)
@given(content=mutated(HEADER).map(file_of) | damaged(BYTES))
def test_any_change_of_a_file_reads_as_the_reference_reads_it_or_is_refused(tmp_path_factory, content):
    folder = Path(tmp_path_factory.getbasetemp()) / "single"
    folder.mkdir(exist_ok=True)
    found, refused = read_or_refused(lambda: read(folder, content))
    if refused:
        assert SINGLE in refused
        return
    reference = load(content)
    assert found.keys() == reference.keys()
    assert all(
        found[name].view(-1).view(torch.uint8).equal(t.view(-1).view(torch.uint8)) for name, t in reference.items()
    )


A = HEADER["a"]
HEADERS: list[tuple[Any, str]] = [
    ([], "instead of an object"),
    (3, "instead of an object"),
    (None, "instead of an object"),
    (RAW[4], "nested more than"),
    (RAW[5], "nested more than"),
    ({**HEADER, "a": RAW[0]}, "NaN is no JSON number"),
    ({**HEADER, "a": [A]}, "a is described by"),
    ({**HEADER, "a": None}, "a is described by"),
    ({**HEADER, "a": {**A, "more": 1}}, "a is described by"),
    ({**HEADER, "a": {**A, "dtype": ["F32"]}}, "a is described by"),
    ({**HEADER, "a": {**A, "dtype": {}}}, "a is described by"),
    ({**HEADER, "a": {**A, "dtype": "F64"}}, "a has dtype F64"),
    ({**HEADER, "a": {**A, "shape": 6}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": "23"}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": {"2": 3}}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": [True, 6]}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": [-2, -3]}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": [2.0, 3.0]}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": [2**70, 2**70]}}, "a is described by"),
    ({**HEADER, "a": {**A, "shape": [2**62, 2**62]}}, "cannot have 24 bytes"),
    ({**HEADER, "a": {**A, "shape": [1] * 100_000}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": [0]}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": [0, 24, 24]}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": 24}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": ["0", "24"]}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": [24, 0]}}, "cannot have -24 bytes"),
    ({**HEADER, "a": {**A, "data_offsets": [-24, 0]}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": [10**400, 10**400 + 24]}}, "a is described by"),
    ({**HEADER, "a": {**A, "data_offsets": [8, 32]}}, "damaged"),
    ({**HEADER, "__metadata__": 3}, "__metadata__ is 3"),
    ({**HEADER, "__metadata__": {"format": ["pt"]}}, "__metadata__ is"),
]


@pytest.mark.parametrize(("header", "said"), HEADERS, ids=[str(i) for i in range(len(HEADERS))])
def test_a_header_that_is_not_what_the_format_says_is_refused(tmp_path, header, said):
    with pytest.raises(CheckpointError, match=rf"{SINGLE}.*{said}"):
        read(tmp_path, file_of(header))


def test_a_header_in_another_encoding_is_refused(tmp_path):
    text = json.dumps({**HEADER, "__metadata__": {"format": "pü"}}, ensure_ascii=False).encode("latin-1")
    with pytest.raises(CheckpointError, match="not UTF-8 text"):
        read(tmp_path, len(text).to_bytes(8, "little") + text + DATA)


def two_shards(folder: Path) -> Path:
    for number, name in enumerate("ab", 1):
        (folder / f"model-{number}.safetensors").write_bytes(save({name: TENSORS[name]}))
    return folder


def read_indexed(folder: Path, index: Any) -> dict[str, torch.Tensor]:
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else as_bytes(index))
    with SafetensorsDirectory(folder) as source:
        return {name: source.rows(name, 0, stored.shape[0]) for name, stored in source.tensors.items()}


@settings(max_examples=100, deadline=None)
@given(index=mutated(INDEXED) | damaged(as_bytes(INDEXED)))
def test_any_change_of_an_index_gives_the_same_tensors_or_one_message(tmp_path_factory, index):
    folder = Path(tmp_path_factory.getbasetemp()) / "sharded"
    if not folder.is_dir():
        folder.mkdir()
        two_shards(folder)
    found, refused = read_or_refused(lambda: read_indexed(folder, index))
    if not refused:
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (None, "weight_map is None"),
        ([], r"weight_map is \[\]"),
        ({}, r"weight_map is {}"),
        ("model-1.safetensors", "weight_map is 'model"),
        ({"a": 3, "b": None}, "in 3, which is no file name"),
        ({"a": ["model-1.safetensors"]}, "which is no file name"),
        ({"a": "/etc/passwd"}, "in '/etc/passwd', which is no file name"),
        ({"a": "../model-1.safetensors"}, "no file name"),
        ({"a": "sub/model-1.safetensors"}, "no file name"),
        ({"a": ""}, "no file name"),
        ({"a": "x" * 5000}, "no file name"),
        ({"a": "a\0b"}, "no file name"),
        (RAW[4], "nested more than"),
        (RAW[0], "NaN"),
    ],
    ids=shown,
)
def test_an_index_of_wrong_types_is_refused(tmp_path, weight_map, said):
    with pytest.raises(CheckpointError, match=rf"{INDEX} is damaged: .*{said}"):
        read_indexed(two_shards(tmp_path), {**INDEXED, "weight_map": weight_map})


def test_an_index_in_another_encoding_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged: not UTF-8"):
        read_indexed(two_shards(tmp_path), json.dumps(INDEXED).encode("utf-16"))


def test_a_single_file_beside_an_index_is_refused_naming_both(tmp_path):
    save_hf(tmp_path, hf_config(num_hidden_layers=1), max_shard_size=70_000)
    (tmp_path / SINGLE).write_bytes(BYTES)
    with pytest.raises(CheckpointError, match=rf"both {SINGLE} and {INDEX} with model-00001-of-.*Remove the one"):
        SafetensorsDirectory(tmp_path)


def test_an_index_may_name_the_single_file(tmp_path):
    (tmp_path / SINGLE).write_bytes(BYTES)
    assert set(read_indexed(tmp_path, {"weight_map": dict.fromkeys(TENSORS, SINGLE)})) == set(TENSORS)
