"""Rotary frequencies for every rope type that Hugging Face configs know, bit for bit those of transformers.

Each function repeats the arithmetic of transformers 5.x `modeling_rope_utils.py` (and `modeling_llama.py` for the plain
type) operation by operation, in fp32 where transformers uses fp32 and in Python floats where it uses those, so that
frequencies, and with them logits, agree bit for bit. Where transformers fills a missing field with a guess (theta
10000, the original window set to the extended one), the field is demanded instead.

Sources: linear (kaiokendev 2023), dynamic (bloc97, emozilla 2023), yarn (Peng et al., arXiv 2309.00071), longrope
(Ding et al., arXiv 2402.13753), llama3 (Llama 3.1 release).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch

from megalong.runtime.errors import ThetaError

_LARGEST_THETA = 1e18  # beyond, fp32 phases of a long window no longer tell positions apart

# Fields of a Hugging Face rope dict besides rope_type and rope_theta: (required, optional).
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """The rope type that a Hugging Face rope dict names ("type" is the spelling before transformers 4.45).

    Raises:
        ThetaError: no type, an unknown one, or two different ones.
    """
    if not scaling:
        return "default"
    names = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    for name in names:
        if not isinstance(name, str) or name not in FIELDS:
            raise ThetaError(f"rope_type={name!r} is not supported for Llama; it is one of {', '.join(FIELDS)}.")
    if not names:
        raise ThetaError(f"The rope dict {dict(scaling)} has no rope_type; it is one of {', '.join(FIELDS)}.")
    if names[0] != names[-1]:
        raise ThetaError(f"The rope dict {dict(scaling)} names two types: {', '.join(sorted(names))}.")
    return str(names[0])


def check_scaling(theta: float | None, head_dim: int, scaling: Mapping[str, Any] | None) -> str:
    """Check that theta and a rope dict define a rotary embedding completely; returns the rope type.

    Raises:
        ThetaError: a field is missing, unknown or out of range.
    """
    kind = rope_type(scaling)
    scaling = scaling or {}
    if theta is None:
        raise ThetaError(
            f"The {kind} rotary embedding has no rope_theta. transformers would silently take 10000: add the "
            "rope_theta that the model was trained with to config.json."
        )
    if not is_number(theta) or not 1.0 < theta <= _LARGEST_THETA:
        raise ThetaError(f"rope_theta={theta!r}: a rotary base is a finite number above 1, at most {_LARGEST_THETA:g}.")
    if head_dim < 2 or head_dim % 2:
        raise ThetaError(f"head_dim={head_dim}: a rotary embedding needs an even head dimension.")
    partial = scaling.get("partial_rotary_factor")
    if partial is not None and partial != 1.0:
        raise ThetaError(f"partial_rotary_factor={partial}: only rotary embeddings over the whole head are supported.")
    required, optional = FIELDS[kind]
    missing = [name for name in required if scaling.get(name) is None]
    if missing:
        raise ThetaError(f"rope_type={kind} needs {', '.join(missing)}; the config gives only {dict(scaling)}.")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *required, *optional}
    unknown = sorted(name for name, value in scaling.items() if name not in known and value is not None)
    if unknown:
        raise ThetaError(f"rope_type={kind} has no field {', '.join(unknown)}; its fields are {sorted(known)}.")
    _check_values(kind, head_dim, scaling)
    return kind


def rotary_frequencies(
    theta: float,
    head_dim: int,
    scaling: Mapping[str, Any] | None = None,
    *,
    max_position_embeddings: int,
    sequence_length: int | None = None,
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies and the factor on cos and sin.

    Args:
        theta: rotary base.
        head_dim: channels per attention head, D.
        scaling: Hugging Face rope dict ({rope_type, ...}), or None for the plain embedding.
        max_position_embeddings: the config's window, tokens.
        sequence_length: tokens of the sequence at hand; "dynamic" and "longrope" depend on it. None: within the window
            (dynamic) and within the original window (longrope), as transformers initialises.

    Returns:
        inv_freq [D/2] fp32 on CPU, radians per token, and the attention factor that multiplies cos and sin.

    Raises:
        ThetaError: the fields do not define a rotary embedding completely, or one that does not turn.
    """
    kind = check_scaling(theta, head_dim, scaling)
    try:
        inv_freq, factor = _frequencies(kind, theta, head_dim, scaling or {}, max_position_embeddings, sequence_length)
    except (ArithmeticError, ValueError) as error:
        raise ThetaError(f"rope_type={kind} with {dict(scaling or {})} cannot be computed: {error}.") from error
    if not (is_number(factor) and factor > 0 and bool((inv_freq > 0).all()) and bool(inv_freq.isfinite().all())):
        raise ThetaError(
            f"rope_type={kind}, rope_theta={theta!r} and {dict(scaling or {})} give frequencies from "
            f"{inv_freq.min():g} to {inv_freq.max():g} and the factor {factor:g}: all must be positive numbers."
        )
    return inv_freq, factor


def _frequencies(
    kind: str, theta: float, head_dim: int, scaling: Mapping[str, Any], window: int, sequence_length: int | None
) -> tuple[torch.Tensor, float]:
    if kind == "yarn":
        return _yarn(theta, head_dim, scaling)
    if kind == "longrope":
        return _longrope(theta, head_dim, scaling, window, sequence_length)
    if kind == "dynamic":
        return _plain(_dynamic_base(theta, head_dim, scaling, window, sequence_length), head_dim), 1.0
    inv_freq = _plain(theta, head_dim)
    if kind == "linear":
        inv_freq /= scaling["factor"]
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, scaling)
    return inv_freq, 1.0


def _plain(theta: float | torch.Tensor, head_dim: int) -> torch.Tensor:
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    return 1.0 / (theta**exponent)


def _dynamic_base(
    theta: float, head_dim: int, scaling: Mapping[str, Any], window: int, sequence_length: int | None
) -> float | torch.Tensor:
    factor = scaling["factor"]
    length: int | torch.Tensor = window
    if sequence_length is not None and sequence_length > window:
        # In its forward pass transformers computes the new base from an int64 tensor, hence in fp32.
        length = torch.tensor(sequence_length)
    return theta * ((factor * length / window) - (factor - 1)) ** (head_dim / (head_dim - 2))


def _yarn(theta: float, head_dim: int, scaling: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    factor, window = scaling["factor"], scaling["original_max_position_embeddings"]

    def mscale(weight: float = 1) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    def dimension(rotations: float) -> float:
        """Channel pair (fractional) that turns `rotations` times over the original window."""
        return (head_dim * math.log(window / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention_factor = float(mscale(numerator) / mscale(denominator)) if numerator and denominator else mscale()

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    # The ramp runs linearly in the channel index, not in the number of rotations as the paper writes it.
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    extrapolated = 1 - ramp
    frequencies = theta ** (torch.arange(0, head_dim, 2).to(torch.float32) / head_dim)
    # `1 - extrapolated`, not `ramp`: the two differ in the last bit, and transformers rounds this way.
    inv_freq = 1.0 / (factor * frequencies) * (1 - extrapolated) + 1.0 / frequencies * extrapolated
    return inv_freq, attention_factor


def _longrope(
    theta: float, head_dim: int, scaling: Mapping[str, Any], window: int, sequence_length: int | None
) -> tuple[torch.Tensor, float]:
    original = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor")
    if factor is None:
        factor = window / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    is_long = sequence_length is not None and sequence_length > original
    stretch = torch.tensor(scaling["long_factor" if is_long else "short_factor"], dtype=torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (stretch * theta**exponent), attention_factor


def _llama3(inv_freq: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    window = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    is_long = wavelength > window / low
    is_medium = ~(wavelength < window / high) * ~is_long
    scaled = torch.where(is_long, inv_freq / factor, inv_freq)
    smooth = (window / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(is_medium, smoothed, scaled)


def _check_values(kind: str, head_dim: int, scaling: Mapping[str, Any]) -> None:
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        value = scaling.get(name)
        if value is not None and (not is_number(value) or value <= 0):
            raise ThetaError(f"rope_type={kind}: {name}={value!r} must be a positive number.")
    for name in ("mscale", "mscale_all_dim"):
        value = scaling.get(name)
        if value is not None and (not is_number(value) or value < 0):
            raise ThetaError(f"rope_type={kind}: {name}={value!r} must be a number, not below 0.")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ThetaError(f"rope_type={kind}: truncate={scaling['truncate']!r} must be true or false.")
    for name in ("short_factor", "long_factor"):
        value = scaling.get(name)
        if value is not None and (
            not isinstance(value, list | tuple) or len(value) != head_dim // 2 or not all(map(is_number, value))
        ):
            raise ThetaError(f"rope_type={kind}: {name} must be {head_dim // 2} numbers (half of head_dim).")
    original = scaling.get("original_max_position_embeddings")
    if original is not None and (type(original) is not int or not 1 <= original < 2**31):
        raise ThetaError(f"rope_type={kind}: original_max_position_embeddings={original!r} must be a positive integer.")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ThetaError("rope_type=llama3: high_freq_factor must be above low_freq_factor.")
    if kind == "dynamic" and head_dim <= 2:
        raise ThetaError(f"rope_type=dynamic needs a head_dim above 2, not {head_dim}.")


def is_number(value: Any) -> bool:
    """Whether a value is a number to compute with: not a bool, not NaN, finite also as a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max
