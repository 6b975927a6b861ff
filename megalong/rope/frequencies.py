"""At which frequencies does a rotary embedding turn, for every rope type that Hugging Face configs know?

Each function repeats the arithmetic of transformers 5.x `modeling_rope_utils.py` (and `modeling_llama.py` for the plain
type) operation by operation, in fp32 where transformers uses fp32 and in Python floats where it uses those, so that
frequencies, and with them logits, agree bit for bit. Where transformers fills a missing field with a guess (theta
10000, the original window set to the extended one), the field is demanded instead.

Sources: linear (kaiokendev 2023), dynamic (bloc97, emozilla 2023), yarn (Peng et al., arXiv 2309.00071), longrope
(Ding et al., arXiv 2402.13753), llama3 (Llama 3.1 release).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megalong.runtime.errors import ThetaError

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
    names = {scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(names) > 1:
        raise ThetaError(f"The rope dict {dict(scaling)} names two types: {', '.join(sorted(map(str, names)))}.")
    if not names:
        raise ThetaError(f"The rope dict {dict(scaling)} has no rope_type; it is one of {', '.join(FIELDS)}.")
    name = names.pop()
    if name not in FIELDS:
        raise ThetaError(f"rope_type={name!r} is not supported for Llama; it is one of {', '.join(FIELDS)}.")
    return str(name)


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
    if not _is_number(theta) or not theta > 1.0:
        raise ThetaError(f"rope_theta={theta!r}: a rotary base is a finite number above 1.")
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
        ThetaError: the fields do not define a rotary embedding completely.
    """
    kind = check_scaling(theta, head_dim, scaling)
    scaling = scaling or {}
    if kind == "yarn":
        return _yarn(theta, head_dim, scaling)
    if kind == "longrope":
        return _longrope(theta, head_dim, scaling, max_position_embeddings, sequence_length)
    if kind == "dynamic":
        return _plain(_dynamic_base(theta, head_dim, scaling, max_position_embeddings, sequence_length), head_dim), 1.0
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
        if value is not None and (not _is_number(value) or value <= 0):
            raise ThetaError(f"rope_type={kind}: {name}={value!r} must be a positive number.")
    for name in ("short_factor", "long_factor"):
        value = scaling.get(name)
        if value is not None and (
            not isinstance(value, list | tuple) or len(value) != head_dim // 2 or not all(map(_is_number, value))
        ):
            raise ThetaError(f"rope_type={kind}: {name} must be {head_dim // 2} numbers (half of head_dim).")
    original = scaling.get("original_max_position_embeddings")
    if original is not None and (not isinstance(original, int) or original < 1):
        raise ThetaError(f"rope_type={kind}: original_max_position_embeddings={original!r} must be a positive integer.")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ThetaError("rope_type=llama3: high_freq_factor must be above low_freq_factor.")
    if kind == "dynamic" and head_dim <= 2:
        raise ThetaError(f"rope_type=dynamic needs a head_dim above 2, not {head_dim}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
