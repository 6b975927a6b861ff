"""Are two model directories the same, and where not? Configs key by key, tensors bit by bit, then logits.

Everything streams: one block of rows of each side at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch

from megalong.convert.blocks import BLOCK
from megalong.convert.dtypes import dtype_name
from megalong.convert.finite import all_finite
from megalong.convert.forward import logits
from megalong.convert.weights import Weights

# Config keys that say how or by what a file was written, not what the model is.
_NOT_MODEL = ("_name_or_path", "transformers_version", "use_cache", "initializer_range")
# Where these have no entry, they mean this.
_DEFAULTS: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "pretraining_tp": 1,
}


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs between two directories."""

    name: str
    what: str
    """A sentence: shapes, dtypes, or values with the first place and the norms."""


@dataclass(frozen=True)
class LogitsAgreement:
    """fp32 logits of two directories for the same tokens."""

    where: str
    """Which positions."""
    max_abs: float
    """Largest absolute difference."""
    relative: float
    """L2 norm of the difference over the L2 norm of the first."""
    argmax: float
    """Share of positions with the same most likely token."""
    odd: int
    """Logits of the first that are NaN or infinite; where the second has the same, they agree."""


def config_differences(a: Weights, b: Weights) -> list[str]:
    """Keys in which two configs describe different models, one sentence each.

    The two spellings of the rotary embedding count once; dtype is compared with the tensors.
    """
    found = []
    ours, theirs = (_comparable(side) for side in (a, b))
    for key in sorted(ours.keys() | theirs.keys()):
        left, right = (side.get(key, _DEFAULTS.get(key)) for side in (ours, theirs))
        if left != right:
            found.append(f"{key}: {left!r} / {right!r}")
    return found


def _comparable(side: Weights) -> dict[str, Any]:
    rope = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")
    ignored = (*rope, *_NOT_MODEL, "dtype", "torch_dtype")
    model = side.model
    return {k: v for k, v in side.config.items() if k not in ignored} | {
        "rope_theta": model.rope_theta,
        "rope": model.rope_scaling,
        "head_dim": model.head_dim,
        "num_key_value_heads": model.num_key_value_heads,
    }


def tensor_differences(
    a: Weights,
    b: Weights,
    progress: Callable[[int], None] = lambda count: None,
    odd: MutableMapping[str, int] | None = None,
) -> Iterator[TensorDifference]:
    """Tensors that differ in presence, shape, dtype or any bit.

    Args:
        progress: called with bytes compared, counted on the first side.
        odd: receives the tensors of the first side that hold NaN or infinity, with how many of them.
    """
    for name in a.tensors:
        if name not in b.tensors:
            yield TensorDifference(name, "only in the first")
            continue
        left, right = a.tensors[name], b.tensors[name]
        if left.shape != right.shape:
            yield TensorDifference(name, f"shape {list(left.shape)} / {list(right.shape)}")
        else:
            what = _value_difference(a, b, name, progress, {} if odd is None else odd)
            if left.dtype != right.dtype:
                dtypes = f"dtype {dtype_name(left.dtype)} / {dtype_name(right.dtype)}"
                yield TensorDifference(name, f"{dtypes}, {what or 'equal in value'}")
            elif what:
                yield TensorDifference(name, what)
    for name in b.tensors:
        if name not in a.tensors:
            yield TensorDifference(name, "only in the second")


def _value_difference(
    a: Weights, b: Weights, name: str, progress: Callable[[int], None], odd: MutableMapping[str, int]
) -> str | None:
    shape = a.tensors[name].shape
    columns = math.prod(shape[1:])
    step = max(1, BLOCK // max(1, columns * 4))
    first: str | None = None
    count, squares, largest = 0, 0.0, 0.0
    for start in range(0, shape[0], step):
        left, right = (side.rows(name, start, min(shape[0], start + step)) for side in (a, b))
        progress(left.numel() * left.element_size())
        if not all_finite(left.view(-1).view(torch.uint8).numpy(), left.dtype):
            odd[name] = odd.get(name, 0) + int((~left.isfinite()).sum())
        if left.dtype == right.dtype:
            unequal = _bits(left) != _bits(right)
        else:
            unequal = ~((left.double() == right.double()) | (left.isnan() & right.isnan()))
        if not bool(unequal.any()):
            continue
        if first is None:
            place = [int(i) for i in unequal.nonzero()[0]]
            values = f"{float(left[tuple(place)])!r} / {float(right[tuple(place)])!r}"
            first = f"first at {[place[0] + start, *place[1:]]}: {values}"
        count += int(unequal.sum())
        difference = (left.double() - right.double()).nan_to_num()
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
    if not count:
        return None
    norms = " / ".join(f"{_norm(side, name, step):.6g}" for side in (a, b))
    return (
        f"{count:,} of {math.prod(shape):,} values differ, {first}; largest difference {largest:.3g}; norms {norms}, "
        f"of the difference {math.sqrt(squares):.3g}"
    )


def _norm(side: Weights, name: str, step: int) -> float:
    rows = side.tensors[name].shape[0]
    parts = (side.rows(name, start, min(rows, start + step)) for start in range(0, rows, step))
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def logits_agreement(a: Weights, b: Weights, length: int = 64) -> list[LogitsAgreement]:
    """Compare logits on a short text: at its own positions, and with half of it at the far end of the window.

    Args:
        length: tokens of the text.
    """
    window = min(a.model.max_position_embeddings, b.model.max_position_embeddings)
    length = min(length, window)
    vocabulary = min(a.model.vocab_size, b.model.vocab_size)
    tokens = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(1234))
    near = torch.arange(length)
    half = length // 2
    far = torch.cat((near[:half], torch.arange(window - (length - half), window)))
    found = []
    for positions, where in (
        (near, f"positions 0..{length - 1}"),
        (far, f"positions 0..{half - 1} and {window - length + half}..{window - 1}"),
    ):
        left, right = (logits(side, tokens, positions)[:, :vocabulary] for side in (a, b))
        same = (left == right) | (left.isnan() & right.isnan())  # infinities too, whose difference would be NaN
        difference = (left - right).masked_fill(same, 0.0)
        found.append(
            LogitsAgreement(
                where,
                float(difference.abs().max()),
                0.0 if bool(same.all()) else float(difference.norm() / left.nan_to_num().norm()),
                float((left.argmax(-1) == right.argmax(-1)).float().mean()),
                int((~left.isfinite()).sum()),
            )
        )
    return found
