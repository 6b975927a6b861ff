"""How does a GGUF say what the rotary embedding is? theta, window, and what llama.cpp knows of scalings.

llama.cpp turns channel pair i by position x theta^(-2i/D) / rope_freqs[i]: so llama3, whose frequencies do not depend
on the length of a text, is a tensor of D/2 factors. `linear` and `yarn` have keys of their own
(ggml/src/ggml-cpu/ops.cpp, `rope_yarn`; src/llama-context.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from megalong.config.schema import ModelConfig
from megalong.rope.frequencies import rotary_frequencies
from megalong.runtime.errors import ThetaError

ROPE_FREQS = "rope_freqs.weight"
_REASONS = {
    "dynamic": "llama.cpp has one theta, whatever the length of a text; transformers makes a new one beyond the window",
    "longrope": "llama.cpp chooses its factors by the size of its context, transformers by the length of a text",
}


def add_rope(writer: GGUFWriter, model: ModelConfig) -> None:
    """Write theta, window and scaling.

    Raises:
        ThetaError: GGUF cannot express the scaling.
    """
    scaling = dict(model.rope_scaling or {"rope_type": "default"})
    kind = scaling["rope_type"]
    if kind in _REASONS:
        raise ThetaError(f"rope_type={kind} cannot be said in a GGUF: {_REASONS[kind]}.")
    if kind == "yarn" and scaling.get("truncate") is False:
        raise ThetaError("rope_type=yarn with truncate=false cannot be said in a GGUF: llama.cpp rounds the ramp.")
    writer.add_context_length(model.max_position_embeddings)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif kind == "yarn":
        _add_yarn(writer, model, scaling)


def _add_yarn(writer: GGUFWriter, model: ModelConfig, scaling: dict[str, Any]) -> None:
    factor = scaling["factor"]
    _, attention = rotary_frequencies(
        model.rope_theta, model.head_dim, scaling, max_position_embeddings=model.max_position_embeddings
    )
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast") or 32.0)
    writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow") or 1.0)
    # llama.cpp multiplies by 1 + 0.1 ln(factor) itself, also where transformers would not
    own = 1.0 + 0.1 * math.log(factor)
    if not math.isclose(attention, own, rel_tol=1e-7):
        writer.add_rope_scaling_attn_factors(attention / own)


def rope_factors(model: ModelConfig) -> np.ndarray | None:
    """`rope_freqs`, float32 [D/2]: by how much each channel pair turns more slowly; None: there is none."""
    if not model.rope_scaling or model.rope_scaling["rope_type"] != "llama3":
        return None
    window = model.max_position_embeddings
    plain, _ = rotary_frequencies(model.rope_theta, model.head_dim, max_position_embeddings=window)
    scaled, _ = rotary_frequencies(model.rope_theta, model.head_dim, model.rope_scaling, max_position_embeddings=window)
    return (plain.double() / scaled.double()).float().numpy()
