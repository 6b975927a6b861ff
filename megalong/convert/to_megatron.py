"""How does a model become a megatron-core checkpoint? Row by row, without building the model.

The result is what `dist_checkpointing.save` writes for a whole model: one record per tensor and layer, layers stacked
under one key, vocabulary without padding (megatron-core pads or cuts it on loading), the extra states that layer specs
ask for, and `megalong.json` with the model's config. It loads at any TP, PP, CP and DP and in either layer spec.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megalong.checkpoint.committed import COMMIT_MARK
from megalong.checkpoint.dcp_metadata import METADATA
from megalong.checkpoint.info import HF_FILES, INFO, CheckpointInfo, info_json
from megalong.checkpoint.plain_values import COMMON
from megalong.checkpoint.torch_record import RecordWriter
from megalong.convert.blocks import Blocks
from megalong.convert.dtypes import dtype_name, one_dtype
from megalong.convert.megatron_dir import is_megatron
from megalong.convert.output_folder import OutputFile, OutputFolder, Progress
from megalong.convert.source import Source
from megalong.convert.table import LAYERS, Entry, layer_table, table
from megalong.convert.weights import HuggingFaceWeights
from megalong.model.llama import with_dtype, with_rope

# Extra states (FP8 statistics in Transformer Engine, nothing otherwise) that a load asks for. One empty object per
# layer; megatron-core's own linears and Transformer Engine's take None for "nothing".
_EXTRA_STATES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def hf_to_megatron(
    source: Path, target: Path, dtype: str | None = None, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Convert a Hugging Face directory to a megatron-core checkpoint.

    Args:
        source: directory with config.json and *.safetensors.
        target: the checkpoint to make.
        dtype: float32, bfloat16 or float16 to cast to; None: as it is, bit for bit.
        overwrite: replace an existing checkpoint.
        progress: follows the writing.

    Raises:
        CheckpointError: the source is damaged, no Llama or not finite, or the target cannot be written.
        ThetaError: the config's rotary embedding is incomplete or contradicts itself.
    """
    with HuggingFaceWeights(source) as weights:
        cast = one_dtype(weights.dtypes(), dtype, source)
        weights.check_tied()
        write_megatron(weights, target, cast, overwrite, progress)


def write_megatron(
    source: Source, target: Path, dtype: torch.dtype, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a source's model as a megatron-core checkpoint; arguments as in `hf_to_megatron`."""
    model, carried = source.model, source.carried()
    hf_config = with_rope(
        with_dtype(source.config, dtype_name(dtype)),
        model.rope_theta,
        model.max_position_embeddings,
        model.rope_scaling,
    )
    info = CheckpointInfo(hf_config, None, model.max_position_embeddings, model.rope_theta)
    needed = sum(math.prod(entry.shape) * dtype.itemsize for entry in table(model))
    with OutputFolder(target, needed, overwrite, is_megatron, progress, source.folder) as folder:
        _Writer(folder, source, dtype).write()
        source.finish()
        folder.small_file(INFO, info_json(info).encode())
        for name, content in carried.items():
            folder.small_file(f"{HF_FILES}/{name}", content)
        folder.small_file(COMMIT_MARK, _COMMIT_TEXT)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


_NOTHING = _saved([None])  # an extra state as megatron-core stores it
_COMMIT_TEXT = json.dumps(
    {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
).encode()


def _record_shape(entry: Entry) -> tuple[int, ...]:
    return entry.shape if entry.layer is None else (1, *entry.shape)


class _Writer:
    """Writes the tensors of one model, one file per layer, and the metadata that ties them together."""

    def __init__(self, folder: OutputFolder, source: Source, dtype: torch.dtype) -> None:
        self.folder, self.model, self.dtype = folder, source.model, dtype
        self.blocks = Blocks(source, dtype)
        self.state: dict[str, Any] = {}
        self.storage: dict[MetadataIndex, _StorageInfo] = {}

    def write(self) -> None:
        outside = [entry for entry in table(self.model) if entry.layer is None]
        self._write_file(0, outside[:1], None)
        for layer in range(self.model.num_hidden_layers):
            self._write_file(layer + 1, layer_table(self.model, layer), layer)
        self._write_file(self.model.num_hidden_layers + 1, outside[1:], None)
        metadata = Metadata(self.state, storage_data=self.storage, storage_meta=StorageMeta())
        self.folder.small_file(METADATA, pickle.dumps(metadata, protocol=4))
        # 3.0: query, key and value rows lie per group, as Megatron-LM's own argument of that name says
        self.folder.small_file(COMMON, _saved({"checkpoint_version": 3.0}))

    def _write_file(self, number: int, entries: list[Entry], layer: int | None) -> None:
        records = [RecordWriter(self.dtype, _record_shape(entry)) for entry in entries]
        extra = len(_NOTHING) * len(_EXTRA_STATES) if layer is not None else 0
        file = self.folder.file(f"__0_{number}.distcp", sum(record.length for record in records) + extra)
        for entry, record in zip(entries, records, strict=True):
            self._write_tensor(file, entry, record)
        if layer is not None:
            self._write_extra_states(file, layer)
        file.close()

    def _write_tensor(self, file: OutputFile, entry: Entry, record: RecordWriter) -> None:
        start, crc = file.size, 0
        file.write(record.head)
        for block in self.blocks.of_megatron(entry):
            crc = zlib.crc32(block.data, crc)
            file.write(block.data)
        file.write(record.tail(crc))
        self._register(entry, _StorageInfo(file.name, start, file.size - start))

    def _register(self, entry: Entry, place: _StorageInfo) -> None:
        shape = _record_shape(entry)
        offsets = torch.Size([0] * len(shape) if entry.layer is None else [entry.layer, *(0 for _ in entry.shape)])
        if entry.key not in self.state:
            layers = self.model.num_hidden_layers
            size = shape if entry.layer is None else (layers, *entry.shape)
            self.state[entry.key] = TensorStorageMetadata(TensorProperties(dtype=self.dtype), torch.Size(size), [])
        chunks = self.state[entry.key].chunks
        chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
        self.storage[MetadataIndex(entry.key, offsets, len(chunks) - 1)] = place

    def _write_extra_states(self, file: OutputFile, layer: int) -> None:
        for module in _EXTRA_STATES:
            key = f"{LAYERS}{module}._extra_state/shard_{layer}_{self.model.num_hidden_layers}"
            self.state[key] = BytesStorageMetadata()
            self.storage[MetadataIndex(key)] = _StorageInfo(file.name, file.size, len(_NOTHING))
            file.write(_NOTHING)
