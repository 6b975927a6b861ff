"""How does a Hugging Face directory become a megatron-core checkpoint? Row by row, without building a model.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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

from megalong.checkpoint.dcp_metadata import METADATA
from megalong.checkpoint.hf import LAYERS, TIED_OUTPUT, Entry, check_tensors, layer_table, runs_between, table
from megalong.checkpoint.info import CARRIED, HF_FILES, INFO, CheckpointInfo, info_json
from megalong.checkpoint.megatron_dir import COMMIT_MARK, is_megatron
from megalong.checkpoint.output import BLOCK, OutputFile, OutputFolder, Progress, row_blocks
from megalong.checkpoint.safetensors_dir import SafetensorsDirectory
from megalong.checkpoint.torch_record import RecordWriter
from megalong.config.schema import ModelConfig
from megalong.model.llama import model_from_hf, read_hf_config, with_dtype, with_rope
from megalong.runtime.errors import CheckpointError, ConfigError

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

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
        CheckpointError: the source is damaged or no Llama, or the target cannot be written.
        ThetaError: the config's rotary embedding is incomplete or contradicts itself.
    """
    config = read_hf_config(source)
    model = model_from_hf(config, str(source / "config.json"))
    with SafetensorsDirectory(source) as tensors:
        check_tensors(model, tensors.tensors, source)
        cast = one_dtype({name: stored.dtype for name, stored in tensors.tensors.items()}, dtype, source)
        _check_tied(model, tensors)
        hf_config = with_rope(
            with_dtype(config, dtype_name(cast)), model.rope_theta, model.max_position_embeddings, model.rope_scaling
        )
        info = CheckpointInfo(hf_config, None, model.max_position_embeddings, model.rope_theta)
        needed = sum(math.prod(entry.shape) * cast.itemsize for entry in table(model))
        with OutputFolder(target, needed, overwrite, is_megatron, progress) as folder:
            _Writer(folder, model, tensors, cast).write()
            folder.small_file(INFO, info_json(info).encode())
            for name in CARRIED:
                if (source / name).is_file():
                    folder.small_file(f"{HF_FILES}/{name}", (source / name).read_bytes())
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


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in a config.json."""
    return str(dtype).removeprefix("torch.")


def one_dtype(found: Mapping[str, torch.dtype], wanted: str | None, where: Path) -> torch.dtype:
    """The dtype of a conversion's result.

    Args:
        found: tensor name -> dtype in the source.
        wanted: name of the dtype to cast to; None: that of the source, which must then have one.

    Raises:
        ConfigError: an unknown name.
        CheckpointError: tensors of several dtypes, and none is wanted.
    """
    if wanted is not None:
        name = DTYPE_ALIASES.get(wanted, wanted)
        if name not in DTYPE_NAMES:
            raise ConfigError(f"dtype {wanted!r} is not one of {', '.join(DTYPE_NAMES)}.")
        return DTYPE_NAMES[name]
    weights = {name: dtype for name, dtype in found.items() if not name.endswith(".inv_freq")}
    first, dtype = next(iter(weights.items()))
    for name, other in weights.items():
        if other != dtype:
            raise CheckpointError(
                f"{where}: tensor {name} has dtype {dtype_name(other)}, but {first} has {dtype_name(dtype)}. Give "
                "--dtype to cast all of them to one."
            )
    return dtype


def _record_shape(entry: Entry) -> tuple[int, ...]:
    return entry.shape if entry.layer is None else (1, *entry.shape)


class _Writer:
    """Writes the tensors of one model, one file per layer, and the metadata that ties them together."""

    def __init__(
        self, folder: OutputFolder, model: ModelConfig, source: SafetensorsDirectory, dtype: torch.dtype
    ) -> None:
        self.folder, self.model, self.source, self.dtype = folder, model, source, dtype
        self.scratch = np.empty(BLOCK, dtype=np.uint8)
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
        self.folder.small_file("common.pt", _saved({"checkpoint_version": 3.0}))

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
        row_bytes = math.prod(entry.shape[1:]) * self.dtype.itemsize
        for first, last in row_blocks(entry.shape[0], row_bytes):
            data = self.scratch[: (last - first) * row_bytes]
            self._fill(data, entry, first, last)
            crc = zlib.crc32(data.data, crc)
            file.write(data.data)
        file.write(record.tail(crc))
        self._register(entry, _StorageInfo(file.name, start, file.size - start))

    def _fill(self, data: np.ndarray, entry: Entry, first: int, last: int) -> None:
        at = 0
        for name, start, stop in runs_between(entry, first, last):
            stored = self.source.tensors[name]
            count = math.prod(stored.shape[1:]) * (stop - start) * self.dtype.itemsize
            part = data[at : at + count]
            at += count
            if stored.dtype == self.dtype:
                self.source.read_into(stored.file, stored.offset + start * stored.row_bytes, part.data)
            else:
                cast = self.source.rows(name, start, stop).to(self.dtype)
                part[:] = cast.view(-1).view(torch.uint8).numpy()
        assert at == len(data), (entry.key, at, len(data))

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


def _check_tied(model: ModelConfig, source: SafetensorsDirectory) -> None:
    """A tied model's own lm_head must be the embedding: converting would silently drop anything else."""
    if not model.tie_word_embeddings or TIED_OUTPUT not in source.tensors:
        return
    stored = source.tensors[TIED_OUTPUT]
    if stored.shape != (model.vocab_size, model.hidden_size):
        raise CheckpointError(f"{stored.file}: tensor {TIED_OUTPUT} has shape {list(stored.shape)}.")
    for start, stop in row_blocks(model.vocab_size, stored.row_bytes):
        head = source.rows(TIED_OUTPUT, start, stop)
        if not torch.equal(head.view(-1), source.rows("model.embed_tokens.weight", start, stop).view(-1)):
            raise CheckpointError(
                f"{stored.file}: tensor {TIED_OUTPUT} differs from the embedding, but config.json says "
                "tie_word_embeddings. Set it to false to keep the tensor, or remove the tensor."
            )
