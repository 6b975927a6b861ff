"""Whatever the records of a Megatron checkpoint say, its tensors read as they were written, or end in one message."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from megalong.checkpoint.committed import COMMIT_MARK
from megalong.checkpoint.dcp_metadata import METADATA
from megalong.checkpoint.info import INFO, read_info
from megalong.convert.megatron_dir import MegatronDirectory, _make_up
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import open_weights
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import shown
from tests.hostile import RAW, as_bytes, damaged, mutated, read_or_refused
from tests.llamas import hf_config, save_hf

SMALL = {"num_hidden_layers": 2, "vocab_size": 10, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
SMALL |= {"num_key_value_heads": 1, "intermediate_size": 6}
FC2 = "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without checksums, so that only what it says itself can be compared."""
    folder = tmp_path_factory.mktemp("whole")
    save_hf(folder / "hf", hf_config(**SMALL))
    hf_to_megatron(folder / "hf", folder / "megatron")
    (folder / "megatron" / "checksums.json").unlink()
    return folder / "megatron"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "megatron")
    return tmp_path / "megatron"


def read(folder: Path) -> dict[str, torch.Tensor]:
    with open_weights(folder) as weights:
        weights.check_files()
        return {name: weights.whole(name) for name in weights.tensors}


def reads_the_same_or_is_refused(folder: Path, whole: Path) -> str:
    found, refused = read_or_refused(lambda: read(folder))
    if not refused:
        expected = read(whole)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    return refused


def metadata_of(folder: Path) -> Metadata:
    return pickle.loads((folder / METADATA).read_bytes())


def put(folder: Path, metadata: Any) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_bytes_of_the_metadata_are_found_or_harmless(whole, tmp_path_factory, data):
    folder = Path(tmp_path_factory.getbasetemp()) / "bytes"
    if not folder.is_dir():
        shutil.copytree(whole, folder)
    (folder / METADATA).write_bytes(data.draw(damaged((whole / METADATA).read_bytes())))
    reads_the_same_or_is_refused(folder, whole)


ANYTHING = st.one_of(
    st.none(),
    st.integers(-2, 9),
    st.sampled_from([2**63, -(2**70), 1.5, "", "x", "../x", "a\0", b"", True, torch.float64, torch.Size([1, 8, 6])]),
    st.sampled_from([(), [], {}, (1, 8, 6), [1, 8, 6], (0, 0, 0), (-1, 8, 6), ("1", 8, 6), (1, 8), (2**62, 8, 6)]),
)


@st.composite
def changes(draw: st.DrawFn) -> Callable[[Metadata], Any]:
    """One field of the metadata's dataclasses becomes anything."""
    value, kind = draw(ANYTHING), draw(st.sampled_from(["metadata", "tensor", "chunk", "index", "place", "key"]))
    number = draw(st.integers(0, 200))
    field = {
        "metadata": ["state_dict_metadata", "storage_data", "planner_data", "storage_meta"],
        "tensor": ["size", "chunks", "properties"],
        "chunk": ["offsets", "sizes"],
        "index": ["fqn", "offset", "index"],
        "place": ["relative_path", "offset", "length", "transform_descriptors"],
        "key": [""],
    }[kind]
    name = draw(st.sampled_from(field))

    def change(metadata: Metadata) -> Any:
        tensors = [t for t in metadata.state_dict_metadata.values() if hasattr(t, "chunks")]
        indices = list(metadata.storage_data)
        if kind == "key":
            metadata.storage_data[value if not isinstance(value, list | dict) else 0] = value
            return metadata
        target = {
            "metadata": metadata,
            "tensor": tensors[number % len(tensors)],
            "chunk": tensors[number % len(tensors)].chunks[0],
            "index": indices[number % len(indices)],
            "place": metadata.storage_data[indices[number % len(indices)]],
        }[kind]
        object.__setattr__(target, name, value)
        return metadata

    return change


@settings(max_examples=200, deadline=None)
@given(change=changes())
def test_any_field_of_any_type_is_found_or_harmless(whole, tmp_path_factory, change):
    folder = Path(tmp_path_factory.getbasetemp()) / "fields"
    if not folder.is_dir():
        shutil.copytree(whole, folder)
    try:
        put(folder, change(metadata_of(whole)))
    except TypeError:  # cannot be written either
        return
    reads_the_same_or_is_refused(folder, whole)


def cut(metadata: Metadata, key: str, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Metadata:
    """Let a tensor consist of other blocks, each with the record of the first for its place."""
    stored = metadata.state_dict_metadata[key]
    places = {i: p for i, p in metadata.storage_data.items() if i.fqn == key}
    stored.chunks = [ChunkStorageMetadata(torch.Size(low), torch.Size(size)) for low, size in boxes]
    for index in places:
        del metadata.storage_data[index]
    for number, (low, _) in enumerate(boxes):
        place = list(places.values())[number % len(places)]
        metadata.storage_data[MetadataIndex(key, torch.Size(low), number)] = place
    return metadata


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0, 0), (1, 8, 6)), ((0, 0, 0), (1, 8, 6))],
        [((0, 0, 0), (1, 8, 6)), ((1, 2, 0), (1, 8, 6))],
        [((0, 0, 0), (1, 8, 6)), ((2, 0, 0), (1, 8, 6))],
        [((0, 0, 0), (1, 8, 6))],
    ],
    ids=["one block twice", "a block moved", "a block outside", "a block missing"],
)
def test_blocks_that_overlap_and_leave_a_hole_are_refused(copy, boxes):
    """The first three have as many values as the tensor."""
    put(copy, cut(metadata_of(copy), FC2, boxes))
    with pytest.raises(CheckpointError, match=rf"\.metadata is damaged: .*({FC2}|linear_fc2)"):
        read(copy)


CUTS = st.lists(st.integers(1, 4), max_size=2, unique=True).map(lambda inner: [0, *sorted(inner), 5])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), axes=st.lists(CUTS, min_size=0, max_size=3))
def test_blocks_make_a_tensor_up_exactly_when_every_value_is_in_one(data, axes):
    grids = [list(itertools.pairwise(axis)) for axis in axes]
    boxes = [(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in itertools.product(*grids)]
    shape = (5,) * len(axes)
    assert _make_up(shape, boxes)
    number = data.draw(st.integers(0, len(boxes) - 1))
    low, size = boxes[number]
    moved = tuple(max(0, at + data.draw(st.integers(-1, 1))) for at in low)
    other = [*boxes[:number], (moved, size), *boxes[number + 1 :]]
    count = torch.zeros([8] * len(axes), dtype=torch.int64)
    for at, n in other:
        count[tuple(slice(a, a + m) for a, m in zip(at, n, strict=True))] += 1
    wanted = torch.zeros_like(count)
    wanted[(slice(0, 5),) * len(axes)] = 1
    assert _make_up(shape, other) == torch.equal(count, wanted)


def replaced(metadata: Metadata, **fields: Any) -> Metadata:
    index = next(i for i in metadata.storage_data if i.fqn == FC2)
    place = metadata.storage_data[index]
    for name, value in fields.items():
        setattr(place, name, value)
    return metadata


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offset": -1}, "-1 stands where a count should"),
        ({"length": -5}, "-5 stands where a count should"),
        ({"length": 2**70}, "stands where a count should"),
        ({"offset": "0"}, "'0' stands where a count should"),
        ({"length": None}, "None stands where a count should"),
        ({"length": 10**12}, "share bytes of|is cut short"),
        ({"relative_path": 3}, "3 is no file of the folder"),
        ({"relative_path": "../x"}, "is no file of the folder"),
        ({"relative_path": "/etc/passwd"}, "is no file of the folder"),
        ({"relative_path": "gone.distcp"}, "is missing"),
        ({"transform_descriptors": ["zstd"]}, "is compressed or encrypted"),
    ],
    ids=shown,
)
def test_a_place_that_is_none_is_refused(copy, fields, said):
    put(copy, replaced(metadata_of(copy), **fields))
    with pytest.raises(CheckpointError, match=said):
        read(copy)


def test_two_tensors_on_the_same_bytes_are_refused(copy):
    metadata = metadata_of(copy)
    first, second = [i for i in metadata.storage_data if i.fqn == FC2]
    metadata.storage_data[second] = metadata.storage_data[first]
    put(copy, metadata)
    with pytest.raises(CheckpointError, match=f"{FC2} and {FC2} share bytes"):
        read(copy)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps([1]),
        pickle.dumps(_StorageInfo("a", 1, 2)),
        pickle.dumps(Metadata([1])),  # type: ignore[arg-type]
        pickle.dumps(Metadata({1: 2})),  # type: ignore[dict-item]
        b"(" * 100_000 + b"l" * 100_000 + b".",
        b"",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x05hello\x4b\x01s\x86b.",
    ],
    ids=["a list", "a place", "a list of tensors", "numbers", "deep", "empty", "an attribute of a class"],
)
def test_a_pickle_of_something_else_is_refused_and_changes_nothing(copy, content):
    (copy / METADATA).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        read(copy)
    assert not hasattr(Metadata, "hello")


# The small records beside it -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_change_of_the_info_gives_the_same_tensors_or_one_message(whole, tmp_path_factory, data):
    folder = Path(tmp_path_factory.getbasetemp()) / "info"
    if not folder.is_dir():
        shutil.copytree(whole, folder)
    document = json.loads((whole / INFO).read_text())
    content = data.draw(mutated(document).map(as_bytes) | damaged(as_bytes(document)))
    (folder / INFO).write_bytes(content)
    found, refused = read_or_refused(lambda: read(folder))
    assert refused or found.keys() <= read(whole).keys() | {"lm_head.weight"}
    info, refused = read_or_refused(lambda: read_info(folder))
    assert refused or {type(info.step), type(info.consumed_samples), type(info.seq_length)} == {int}
    assert refused or type(info.theta) is float


BAD_INFO: dict[str, list[Any]] = {
    "hf_config": [None, [], "x", 3],
    "stage": [3, [], {}],
    "seq_length": ["512", 512.0, None, True, -1, 10**400],
    "theta": ["500000", None, [], 10**400, RAW[0], RAW[1]],
    "step": ["3", -1, 3.5, None, {}],
    "consumed_samples": ["3", -1, False],
    "versions": [3, {"torch": 2}, ["2.0"]],
    "format_version": [2, "1", None, [1], RAW[4], RAW[3]],
}


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key, values in BAD_INFO.items() for value in values],
    ids=shown,
)
def test_a_field_of_the_info_of_a_wrong_type_is_refused_by_name(copy, key, value):
    document = json.loads((copy / INFO).read_text())
    (copy / INFO).write_bytes(as_bytes({**document, key: value}))
    with pytest.raises(CheckpointError, match=r"megalong\.json (is damaged|has format version)"):
        read_info(copy)


@pytest.mark.parametrize(
    "content", [b"[]", b"3", b"\xff", b"", b'{"sharded_backend": ["torch_dist"]}', as_bytes(RAW[4])]
)
def test_a_damaged_commit_mark_is_one_message(copy, content):
    (copy / COMMIT_MARK).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"metadata\.json is damaged|sharded backend"):
        MegatronDirectory(copy)
