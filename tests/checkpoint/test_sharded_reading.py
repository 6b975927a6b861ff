"""Any cut on disk is read into any cut in memory, and what does not make up a tensor is refused."""

from __future__ import annotations

import io
import itertools
import json
import math
import pickle
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalong.checkpoint import sharded_reading
from megalong.checkpoint.sharded_reading import ShardedFolder, entries_of
from megalong.checkpoint.stored_blocks import Block
from megalong.convert.to_megatron import hf_to_megatron
from megalong.runtime.errors import CheckpointError
from megalong.runtime.ranks import RankPool
from megalong.topology.layout import Layout
from tests.llamas import hf_config, save_hf

KEY = "decoder.weight"


def write(folder: Path, tensor: torch.Tensor, blocks: list[Block]) -> Path:
    """A checkpoint of one tensor, cut into blocks, as megatron-core writes it."""
    storage, data = {}, b""
    for number, block in enumerate(blocks):
        part = tensor
        for axis, (low, size) in enumerate(zip(block.low, block.size, strict=True)):
            part = part.narrow(axis, low, size)
        stream = io.BytesIO()
        torch.save(part.clone(), stream)
        place = _StorageInfo("__0_0.distcp", len(data), len(stream.getvalue()))
        storage[MetadataIndex(KEY, torch.Size(block.low), number)] = place
        data += stream.getvalue()
    chunks = [ChunkStorageMetadata(torch.Size(block.low), torch.Size(block.size)) for block in blocks]
    described = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    (folder / "__0_0.distcp").write_bytes(data)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({KEY: described}, storage_data=storage)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


def wanted(shape: tuple[int, ...], block: Block, dtype: torch.dtype, layers: int = 0, flexible: bool = False):
    """What a rank holds: a block of a tensor, with the layer axis only in the name of its place."""
    data = torch.full(block.size[layers:], -1.0, dtype=dtype)
    return ShardedTensor(KEY, data, dtype, block.size[layers:], shape, block.low, None, 0, layers, flexible)


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, size), max_size=3).map(lambda inner: sorted({0, *inner, size}))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_cut_on_disk_into_any_cut_in_memory(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    axes = [list(itertools.pairwise(data.draw(cuts(size)))) for size in shape]
    blocks = [Block(tuple(a for a, _ in grid), tuple(b - a for a, b in grid)) for grid in itertools.product(*axes)]
    dtype, here = (data.draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in range(2))
    layers = data.draw(st.integers(0, 1)) if len(shape) > 1 else 0
    low = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    size = tuple(
        1 if axis < layers else data.draw(st.integers(1, n - at))
        for axis, (n, at) in enumerate(zip(shape, low, strict=True))
    )
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    entry = wanted(shape, Block(low, size), here, layers)
    if data.draw(st.booleans()) and entry.data.ndim > 1:
        entry.data = entry.data.t().contiguous().t() if entry.data.ndim == 2 else entry.data  # columns first
    sizes = {
        "_READ": data.draw(st.sampled_from([4, 16, 1 << 20])),
        "_SEEK": data.draw(st.sampled_from([1, 8, 1 << 20])),
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.multiple(sharded_reading, **sizes),
        ShardedFolder(write(Path(scratch), tensor, blocks)) as source,
    ):
        source.fill([entry])
    expected = tensor[tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))]
    assert torch.equal(entry.data, expected.reshape(entry.data.shape).to(here))


def test_memory_of_one_element_may_have_any_stride(tmp_path):
    entry = wanted((1, 1), Block((0, 0), (1, 1)), torch.float32)
    entry.data = torch.zeros(4).as_strided((1, 1), (2, 2))
    with ShardedFolder(write(tmp_path, torch.ones(1, 1), [Block((0, 0), (1, 1))])) as source:
        source.fill([entry])
    assert entry.data.item() == 1.0


@pytest.mark.parametrize("rows", [(0, 4), (4, 4), (8, 4)])
def test_what_only_pads_the_vocabulary_is_zero(tmp_path, rows):
    tensor = torch.arange(1.0, 13.0).view(6, 2)
    entry = wanted((12, 2), Block((rows[0], 0), (rows[1], 2)), torch.float32, flexible=True)
    with ShardedFolder(write(tmp_path, tensor, [Block((0, 0), (6, 2))])) as source:
        source.fill([entry])
    assert torch.equal(entry.data, torch.cat([tensor, torch.zeros(6, 2)])[rows[0] : sum(rows)])


WHOLE = [Block((0, 0), (2, 3)), Block((2, 0), (2, 3))]


@pytest.mark.parametrize(
    ("blocks", "shape", "flexible", "said"),
    [
        (WHOLE, (4, 4), False, r"tensor decoder\.weight has shape \[4, 3\], the model \[4, 4\]"),
        (WHOLE, (4, 4), True, r"tensor decoder\.weight has shape \[4, 3\], the model \[4, 4\]"),
        (WHOLE, (4, 3, 1), False, r"has shape \[4, 3\]"),
        (WHOLE[:1], (4, 3), False, r"the parts of decoder\.weight do not make it up"),
        ([*WHOLE[:1], Block((1, 0), (2, 3))], (4, 3), False, r"the parts of decoder\.weight do not make it up"),
        ([*WHOLE, Block((1, 0), (2, 3))], (4, 3), False, r"the parts of decoder\.weight do not make it up"),
    ],
    ids=["shape", "columns of a vocabulary", "axes", "a hole", "a hole and an overlap", "an overlap"],
)
def test_parts_that_are_not_the_tensor_are_refused(tmp_path, blocks, shape, flexible, said):
    write(tmp_path, torch.ones(4, 3), blocks)
    entry = wanted(shape, Block((0,) * len(shape), shape), torch.float32, flexible=flexible)
    with ShardedFolder(tmp_path) as source, pytest.raises(CheckpointError, match=said):
        source.fill([entry])


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write(tmp_path, torch.ones(4, 3), WHOLE)
    entry = wanted((4, 3), Block((0, 0), (4, 3)), torch.float32)
    entry.key = "decoder.other"
    with ShardedFolder(tmp_path) as source, pytest.raises(CheckpointError, match=r"it has no tensor decoder\.other"):
        source.fill([entry])


@pytest.mark.parametrize("name", ["../outside", "gone.distcp"])
def test_a_part_that_lies_outside_of_the_folder_or_nowhere_is_refused(tmp_path, name):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, torch.ones(4, 3), WHOLE)
    (folder / "__0_0.distcp").rename(tmp_path / "outside")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = _StorageInfo(name, place.offset, place.length)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    entry = wanted((4, 3), Block((0, 0), (4, 3)), torch.float32)
    with pytest.raises(CheckpointError, match=name), ShardedFolder(folder) as source:
        source.fill([entry])


# beside megatron-core's own reader ---------------------------------------------------------------------------------


def read_twice(folder: Path, saved: Path, layout: Layout, engine_spec: bool) -> list[str]:
    """Names of parameters that megatron-core's reader and ours fill differently, after either wrote the folder."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from tests.convert.test_convert import load

    module, _ = load(folder, layout, 64, engine_spec)
    expected = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    if dist.get_rank() == 0:
        saved.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": module.sharded_state_dict()}, str(saved))
    different = []
    for source_folder in (folder, saved):
        for parameter in module.parameters():
            parameter.data.fill_(-1.0)
        with ShardedFolder(source_folder) as source:
            source.check_extra_states()
            source.fill(entries_of(module.sharded_state_dict()))
        different += [name for name, p in module.named_parameters() if not torch.equal(p, expected[name])]
    return different


@pytest.mark.parametrize("engine_spec", [False, True], ids=["local spec", "spec of Transformer Engine's shape"])
def test_a_model_is_filled_as_megatron_fills_it(tmp_path, ranks: RankPool, engine_spec):
    save_hf(tmp_path / "hf", hf_config(num_hidden_layers=2, attention_bias=True))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype="bfloat16")  # into an fp32 model
    layout = Layout(tp=4)  # which pads the vocabulary of 250
    found = ranks.run(read_twice, 4, tmp_path / "megatron", tmp_path / "saved", layout, engine_spec)
    assert found == [[]] * 4
