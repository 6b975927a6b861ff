"""Which dtype does the result of a conversion have? One for all tensors: the source's own, or the one asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megalong.runtime.errors import CheckpointError, ConfigError

DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


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
