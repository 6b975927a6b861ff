"""Is theta large enough for a window? The lower bound of Men et al., and how far the critical dimension turns.

Men et al. (Base of RoPE Bounds Context Length, arXiv 2405.14591, theorem 1): a key like the query gets more attention
than a random one, on average and at distance m, by a factor proportional to `B(m) = sum_i cos(m * theta_i)`. A base
below which B turns negative inside the window gives a model whose perplexity is fine and which cannot retrieve.

The set of bases with B(m) >= 0 for all m < L is not an interval: above its smallest member there are others that fail
(Su, kexue.fm/archives/10122, 2024). "The" bound depends on how finely one looks, so here it is the smallest base *of
three significant digits* that holds; a base above it is still looked at by itself (`first_negative`).

Liu et al. (arXiv 2310.05209, definition 1): the critical dimension is the last one that turned a whole period in the
window of pre-training; those behind it have never been seen whole. The scaling law is the theta at which that
dimension's wavelength equals the new window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from megalong.rope.theta import RotaryPoint
from megalong.runtime.errors import ThetaError

_LARGEST = 1e18  # as frequencies.py: beyond, fp32 phases no longer tell positions apart
_CELLS = 2**18  # results of one matrix product: 2 MiB
_LOWEST = 16  # rows looked at first: a base that fails mostly shows it where the slow dimensions stand lowest


def plain_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta ** (-2i / d), radians per token, [D/2] float64."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def first_negative(frequencies: Sequence[float] | np.ndarray, window: int) -> int | None:
    """The first distance below `window` at which B(m) is negative; None where there is none.

    Args:
        frequencies: [D/2] radians per token, of any rope type.
        window: tokens; distances run from 0 to window - 1.
    """
    row = _row(window)
    fine, rows = _fine(frequencies, row), -(-window // row)
    for start in range(0, rows, _CELLS // row):
        some = np.arange(start, min(start + _CELLS // row, rows))
        found = np.flatnonzero((_coarse(some, frequencies, row) @ fine).reshape(-1) < 0)
        if len(found) and start * row + found[0] < window:
            return int(start * row + found[0])
    return None


def lower_bound(window: int, head_dim: int) -> float:
    """The smallest rotary base of three significant digits with B(m) >= 0 for all m < window.

    Raises:
        ThetaError: an odd head dimension, a window of no token, or no base up to 1e18 holds (tiny head dimensions).
    """
    if head_dim < 2 or head_dim % 2:
        raise ThetaError(f"head_dim={head_dim}: a rotary embedding needs an even head dimension.")
    if window < 1:
        raise ThetaError(f"window={window}: a window is at least one token.")
    # with growing head dimension the bound falls towards window / 0.617 (Ci's first zero, Su 2024), and not below
    for theta in _three_digits(float(max(2, window))):
        if _holds(plain_frequencies(theta, head_dim), window):
            return theta
    raise ThetaError(
        f"head_dim={head_dim}: no rotary base up to {_LARGEST:g} keeps similar tokens ahead over {window:,} tokens."
    )


def critical_wavelength(base: RotaryPoint, theta: float) -> float:
    """Tokens in which the critical dimension turns once under another theta.

    The dimension is taken as a real number (its wavelength under `base` is the base's window), so that the scaling
    law gives exactly the window that it was asked for. Does not depend on the head dimension.

    Raises:
        ThetaError: the base's window is at most 2 pi tokens.
    """
    if base.window <= 2 * math.pi:
        raise ThetaError(f"Window {base.window}: the critical dimension needs more than 2 pi tokens.")
    share = math.log(base.window / (2 * math.pi)) / math.log(base.theta)  # 2i / d of that dimension
    return 2 * math.pi * theta**share


def bound_warning(theta: float, window: int, head_dim: int, frequencies: Sequence[float] | None = None) -> str | None:
    """What to tell of a theta that is too small for a window; None when it is not.

    Takes milliseconds where there is nothing to tell, some seconds at a million tokens where there is.

    Args:
        frequencies: [D/2] radians per token where a rope scaling has changed them; None: theta's own.
    """
    scaled = frequencies is not None
    used = plain_frequencies(theta, head_dim) if frequencies is None else frequencies
    at = first_negative(used, window)
    if at is None:
        return None
    try:
        bound = lower_bound(window, head_dim)
    except ThetaError:
        return None  # a head too small for any base to hold
    what = (
        f"theta {theta:,.0f} with its rope scaling" if scaled else f"theta {theta:,.0f}"
    ) + f" and head_dim {head_dim}: from a distance of {at:,} tokens on, inside the window of {window:,}, "
    why = "similar tokens no longer get more attention than random ones (Men et al., arXiv 2405.14591)"
    if scaled:
        return f"{what}{why}."
    if theta < bound:
        return f"{what}{why}. The lower bound for this window is {bound:,.0f}."
    return f"{what}{why}, although theta is above the lower bound of {bound:,.0f}: a little more or less may pass."


def _holds(frequencies: np.ndarray, window: int) -> bool:
    """Whether B(m) >= 0 for all m < window, told sooner than by `first_negative` where it is not."""
    row = _row(window)
    whole = window // row
    if whole > _LOWEST:
        slow = frequencies[frequencies * row < 1.0]
        height = np.cos((np.arange(whole) * float(row))[:, None] * slow).sum(axis=1)
        lowest = np.argpartition(height, _LOWEST)[:_LOWEST]
        if bool((_coarse(lowest, frequencies, row) @ _fine(frequencies, row) < 0).any()):
            return False
    return first_negative(frequencies, window) is None


def _row(window: int) -> int:
    """Positions of a row, m = row * a + b: a power of two near the square root, so that both factors stay small."""
    return 1 << max(4, window.bit_length() // 2)


def _fine(frequencies: Sequence[float] | np.ndarray, row: int) -> np.ndarray:
    """cos and -sin of b * f, [D, row] float64: by the addition theorem B is one matrix product."""
    phases = np.asarray(frequencies, dtype=np.float64)[:, None] * np.arange(row)
    return np.concatenate((np.cos(phases), -np.sin(phases)))


def _coarse(rows: np.ndarray, frequencies: Sequence[float] | np.ndarray, row: int) -> np.ndarray:
    phases = (rows * float(row))[:, None] * np.asarray(frequencies, dtype=np.float64)
    return np.concatenate((np.cos(phases), np.sin(phases)), axis=1)


def _three_digits(start: float) -> Iterator[float]:
    """The numbers of three significant digits from `start` to 1e18, ascending."""
    exponent = math.floor(math.log10(start)) - 2
    digits = math.ceil(start / 10.0**exponent)
    while (value := float(digits * 10**exponent if exponent >= 0 else digits / 10**-exponent)) <= _LARGEST:
        yield value
        digits += 1
        if digits == 1000:
            digits, exponent = 100, exponent + 1
