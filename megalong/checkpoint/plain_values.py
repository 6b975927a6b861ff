"""What plain values lie in something that `torch.save` wrote? Numbers, texts and containers of them; nothing is run.

Two things in a checkpoint are pickled values and no tensors: the common state (`common.pt`: step, cursor, settings of
the optimizer) and extra states of modules. The first may hold numbers, texts and containers of them, the second
nothing.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from megalong.runtime.errors import CheckpointError

COMMON = "common.pt"
_LARGEST_EMPTY = 1 << 16  # bytes; [None] takes about a thousand


def read_common(folder: Path) -> dict[str, Any]:
    """The common state of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or anything but plain values.
    """
    path = folder / COMMON
    try:
        values = _load(path.read_bytes())
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}")
        _check_plain(values)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a whole checkpoint.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} cannot be read as plain values: {_first_line(error)}") from error
    return values


def holds_nothing(data: bytes) -> bool:
    """Whether what `torch.save` wrote is None, or empty, or a list of such; False for all that cannot be read safely.

    Modules without FP8 state save None, an empty tensor, or (Transformer Engine before 1.12) None saved once more.
    """
    if len(data) > _LARGEST_EMPTY:
        return False
    try:
        return _is_nothing(_load(data))
    except Exception:  # whatever it is, it is not nothing
        return False


def _load(data: bytes) -> Any:
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _is_nothing(value: Any) -> bool:
    if isinstance(value, io.BytesIO):
        return holds_nothing(value.getvalue())
    if isinstance(value, list | tuple):
        return all(_is_nothing(item) for item in value)
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    return value is None or value == {}


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key)
            _check_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item)
    elif not (value is None or isinstance(value, str | int | float)):
        raise pickle.UnpicklingError(f"a {type(value).__name__} has no place in it")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'damaged'}"
