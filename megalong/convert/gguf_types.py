"""Which type does each tensor of a GGUF have? One name for the file, and what follows from it tensor by tensor.

Vectors (norms, biases) are always fp32, as llama.cpp's own converter has it. A quantized row is made of blocks of 32
values; a matrix whose rows are no multiple of it stays f16. With four or five bits the output layer (or the embedding
in its place) gets eight: every logit goes through it, and llama.cpp's own `llama-quantize` spares it too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from megalong.convert.table import TIED_OUTPUT
from megalong.runtime.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
_PLAIN = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
NAMES = tuple(_FILE_TYPES)
"""What `--type` may say."""
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class FileTypes:
    """The types of a file's tensors.

    Args:
        name: one of `NAMES`.
        tied: the embedding is the output layer.
    """

    name: str
    tied: bool

    @property
    def file_type(self) -> LlamaFileType:
        """What `general.file_type` says."""
        return _FILE_TYPES[self.name]

    @property
    def is_quantized(self) -> bool:
        return self.name.startswith("q")

    def of(self, hf_name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """The type of a tensor, by its Hugging Face name and shape."""
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        kind = GGMLQuantizationType[self.name.upper()]
        if self.is_quantized and hf_name == (EMBEDDING if self.tied else TIED_OUTPUT):
            kind = GGMLQuantizationType.Q8_0
        return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] and self.is_quantized else kind


def file_types(wanted: str | None, dtype: torch.dtype, tied: bool) -> FileTypes:
    """The types of a file.

    Args:
        wanted: one of `NAMES`, in any case; None: matrices stay as they are, bit for bit.
        dtype: of the source.
        tied: the embedding is the output layer.

    Raises:
        ConfigError: an unknown name.
    """
    name = _OF_DTYPE[dtype] if wanted is None else wanted.lower()
    if name not in NAMES:
        raise ConfigError(
            f"--type {wanted}: it is one of {', '.join(NAMES)}. For llama.cpp's k-quants make f32 or bf16 here, and "
            "give that to llama-quantize."
        )
    return FileTypes(name, tied)


def nbytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor, without padding."""
    values, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // values * size


def plain_dtype(kind: GGMLQuantizationType) -> torch.dtype:
    """The dtype in which a tensor is read: its own, or fp32 to be quantized."""
    return _PLAIN.get(kind, torch.float32)


def largest(kind: GGMLQuantizationType) -> float:
    """The largest absolute value that a quantized tensor may hold: a block's scale is an f16."""
    return math.inf if kind in _PLAIN else float(np.finfo(np.float16).max)
