"""How does a model become a GGUF, the file that llama.cpp reads? Row by row, one block in memory.

The header (metadata, tokenizer, names, shapes, types, offsets) is the gguf library's, made before the first tensor is
read, and so are the quantizers. Query and key rows of a head are put in another order: Hugging Face rotates channel i
with channel i + D/2, llama.cpp neighbours (`LlamaModel.permute` of its convert_hf_to_gguf.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import quantize

import megalong
from megalong.config.schema import ModelConfig
from megalong.convert.blocks import Blocks
from megalong.convert.dtypes import one_dtype
from megalong.convert.gguf_card import add_card
from megalong.convert.gguf_rope import ROPE_FREQS, add_rope, rope_factors
from megalong.convert.gguf_tokenizer import vocabulary
from megalong.convert.gguf_types import FileTypes, file_types, largest, nbytes, plain_dtype
from megalong.convert.output_folder import OutputFolder, Progress
from megalong.convert.table import hf_shapes
from megalong.convert.weights import HuggingFaceWeights, MegatronWeights, Weights
from megalong.runtime.errors import CheckpointError

MARK = b"megalong.bytes"
"""Key by which a file that was written here is known; its value, the file's size, tells a whole one from a part."""
_FRONT = 4096  # bytes in which it lies
_ROTATED = ("self_attn.q_proj.", "self_attn.k_proj.")


def hf_to_gguf(
    source: Path,
    target: Path,
    kind: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert a Hugging Face directory to a GGUF; what its README.md says in front is taken along.

    Args:
        source: directory with config.json, *.safetensors and the tokenizer.
        target: the file to make.
        kind: a name of `gguf_types.NAMES`; None: matrices stay as they are, bit for bit.
        overwrite: replace a GGUF that was written here.
        progress: follows the writing.

    Raises:
        CheckpointError: the source is damaged, no Llama, not finite or has no tokenizer that llama.cpp can have, or the
            target cannot be written.
        ThetaError: GGUF cannot express the rotary embedding.
    """
    with HuggingFaceWeights(source) as weights:
        weights.check_tied()
        path = source / "README.md"
        card = path.read_text("utf-8", "replace") if path.is_file() else None
        write_gguf(weights, target, kind, card, overwrite, progress)


def megatron_to_gguf(
    source: Path,
    target: Path,
    kind: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert a megatron-core checkpoint, or the newest one of a run_dir, to a GGUF; arguments as in `write_gguf`."""
    with MegatronWeights(source) as weights:
        write_gguf(weights, target, kind, card, overwrite, progress)


def write_gguf(
    source: Weights,
    target: Path,
    kind: str | None = None,
    card: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a source's model as a GGUF.

    Args:
        kind, overwrite, progress: as in `hf_to_gguf`.
        card: the model's README.md, for name, licence and lineage; None: there is none.
    """
    model = source.model
    stored = one_dtype(source.dtypes(), None if kind is None else "float32", source.folder)
    types = file_types(kind, stored, model.tie_word_embeddings)
    shapes = hf_shapes(model)
    header, needed = _header(source, types, shapes, target, card)
    with OutputFolder(target, needed, overwrite, is_ours, progress, source.folder, single=True) as folder:
        file = folder.file(target.name, needed)
        file.write(header)
        factors = rope_factors(model)
        if factors is not None:
            file.write(_padded(factors.tobytes()))
        readers: dict[torch.dtype, Blocks] = {}
        for name, shape in shapes.items():
            tensor_type = types.of(name, shape)
            dtype = plain_dtype(tensor_type)
            written = 0
            for data in _blocks(readers.setdefault(dtype, Blocks(source, dtype)), name, model, tensor_type):
                file.write(data.data)
                written += data.nbytes
            file.write(bytes(-written % GGUF_DEFAULT_ALIGNMENT))
        source.finish()
        file.close()


def is_ours(target: Path) -> bool:
    """Whether a file is a whole GGUF that was written here."""
    try:
        with target.open("rb") as file:
            front = file.read(_FRONT)
        size = target.stat().st_size
    except OSError:
        return False
    return front.startswith(b"GGUF") and front[_size_at(front) :].startswith(size.to_bytes(8, "little"))


def _size_at(front: bytes) -> int:
    """Where the value of `MARK` begins: behind the key and the number of its type; the end where there is no key."""
    found = front.find(MARK)
    return len(front) if found < 0 else found + len(MARK) + 4


def _header(
    source: Weights, types: FileTypes, shapes: dict[str, tuple[int, ...]], target: Path, card: str | None
) -> tuple[bytes, int]:
    """Everything before the tensors, and the bytes of the whole file."""
    model = source.model
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA])
    writer.add_type(GGUFType.MODEL)
    writer.add_uint64(MARK.decode(), 0)  # the size, once it is known
    writer.add_string("megalong.version", megalong.__version__)
    for key in ("stage", "step", "consumed_samples"):
        value = source.extra().get(key)
        if value is not None:
            writer.add_string(f"megalong.{key}", str(value))
    add_card(writer, card, target, sum(int(np.prod(shape)) for shape in shapes.values()))
    _add_shape(writer, model)
    add_rope(writer, model)
    writer.add_file_type(types.file_type)
    if types.is_quantized:
        writer.add_quantization_version(GGML_QUANT_VERSION)
    vocabulary(source.carried(), source.config, source.folder).add_to(writer)
    total = 0
    factors = rope_factors(model)
    if factors is not None:
        writer.add_tensor_info(ROPE_FREQS, factors.shape, factors.dtype, factors.nbytes)
        total += len(_padded(factors.tobytes()))
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.num_hidden_layers)
    for name, shape in shapes.items():
        tensor_type = types.of(name, shape)
        size = nbytes(shape, tensor_type)
        total += size + -size % GGUF_DEFAULT_ALIGNMENT
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        writer.add_tensor_info(gguf_name, shape, np.dtype(np.float32), size, raw_dtype=tensor_type)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "header"
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = _padded(path.read_bytes())
    size, at = len(header) + total, _size_at(header)
    return header[:at] + size.to_bytes(8, "little") + header[at + 8 :], size


def _add_shape(writer: GGUFWriter, model: ModelConfig) -> None:
    writer.add_vocab_size(model.vocab_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)


def _blocks(blocks: Blocks, name: str, model: ModelConfig, kind: GGMLQuantizationType) -> Iterator[np.ndarray]:
    """The bytes of a tensor as they lie in the file, uint8."""
    shape = blocks.source.tensors[name].shape
    columns = shape[1] if len(shape) > 1 else 1
    head = model.head_dim if any(part in name for part in _ROTATED) else 1
    limit = largest(kind)
    for block in blocks.of_hf(name, together=head):
        data = block
        if head > 1:
            data = _neighbours(data, head, columns * blocks.dtype.itemsize)
        if limit < np.inf:
            values = data.view(np.float32).reshape(-1, columns)
            top = float(np.abs(values).max())
            if top > limit:
                raise CheckpointError(
                    f"{blocks.source.place(name)}: tensor {name} holds {top:g}; a value beyond {limit:g} cannot be "
                    f"quantized to {kind.name.lower()}. Give --type f32 or bf16."
                )
            data = quantize(values, kind).reshape(-1)
        yield data.reshape(-1).view(np.uint8)


def _neighbours(block: np.ndarray, head_dim: int, row_bytes: int) -> np.ndarray:
    """Rows of whole heads with channels i and i + D/2 beside each other.

    Args:
        block: uint8 [heads * D * row_bytes].
    """
    return np.ascontiguousarray(block.reshape(-1, 2, head_dim // 2, row_bytes).swapaxes(1, 2)).reshape(-1)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % GGUF_DEFAULT_ALIGNMENT)
