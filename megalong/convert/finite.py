"""Are the weights that pass through a conversion numbers? NaN and infinity are refused, by tensor, value and place.

They are the values all of whose exponent bits are set, so one pass over a block's integers finds them. It is done in
pieces that stay in the processor's cache, for every block of every conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalong.convert.dtypes import dtype_name
from megalong.runtime.errors import CheckpointError

_EXPONENTS: dict[torch.dtype, tuple[type[np.unsignedinteger], int]] = {
    torch.float32: (np.uint32, 0x7F800000),
    torch.bfloat16: (np.uint16, 0x7F80),
    torch.float16: (np.uint16, 0x7C00),
}
_PIECE = 1 << 17  # values


def all_finite(data: np.ndarray, dtype: torch.dtype) -> bool:
    """Whether there is no NaN and no infinity among values.

    Args:
        data: their bytes, uint8 [values * size of the dtype].
        dtype: float32, bfloat16 or float16.
    """
    kind, exponent = _EXPONENTS[dtype]
    values = data.view(kind)
    scratch = np.empty(min(_PIECE, len(values)), dtype=kind)
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        found = np.bitwise_and(piece, kind(exponent), out=scratch[: len(piece)])
        if found.max() == exponent:
            return False
    return True


def require_finite(
    data: np.ndarray,
    dtype: torch.dtype,
    name: str,
    first_row: int,
    columns: tuple[int, ...],
    source: Path,
    stored: Callable[[], Tensor],
) -> None:
    """Check rows of a tensor as they will be written.

    Args:
        data: their bytes, uint8.
        dtype: of the result.
        name: the tensor.
        first_row: number of the first of them in the tensor.
        columns: shape of one row.
        source: where the tensor comes from.
        stored: gives the same rows as they lie in the source.

    Raises:
        CheckpointError: a value is not finite, or does not stay so in the dtype of the result.
    """
    if all_finite(data, dtype):
        return
    values = torch.from_numpy(data).view(dtype).view(-1, *columns)
    bad = ~values.isfinite()
    place = tuple(int(i) for i in bad.nonzero()[0])
    where = [first_row + place[0], *place[1:]]
    before = stored().view(values.shape)[place]
    if before.isfinite():
        after = f"{float(values[place])} in {dtype_name(dtype)}"
        raise CheckpointError(
            f"{source}: tensor {name} has the value {float(before):.6g} at {where}, which becomes {after}. Choose a "
            "--dtype with more range, or none."
        )
    count, rows = int(bad.sum()), f"rows {first_row} to {first_row + len(values) - 1}"
    raise CheckpointError(
        f"{source}: tensor {name} has {count:,} of {math.prod(values.shape):,} values that are not finite in {rows}, "
        f"the first at {where}: {float(before)}. No model computes with them: use an older checkpoint or another copy."
    )
