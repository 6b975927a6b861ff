"""The rope scaling of a stage: what it leaves out is filled in, and whether theta is large enough is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalong.config.schema import ModelConfig, ScaleConfig, StageConfig
from megalong.recipe.stages import load_stage, scaled
from megalong.run import Run
from megalong.runtime.errors import ConfigError

_WITH_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_WITH_ORIGINAL_WINDOW = ("yarn", "llama3", "longrope")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of the Llama 3.1 release


def scaling_of(stage: StageConfig, model: ModelConfig) -> dict[str, Any] | None:
    """The stage's own rope dict, complete; None where it has none.

    Args:
        stage: with its scaled window.

    Raises:
        ConfigError: it is no dictionary.
    """
    given = stage.rope_scaling
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"stage.rope_scaling={given!r}: give {{rope_type: ..., ...}}, or null.")
    kind, base = given.get("rope_type"), model.max_position_embeddings
    filled: dict[str, Any] = {}
    if kind in _WITH_FACTOR:
        filled["factor"] = stage.seq_length / base
    if kind in _WITH_ORIGINAL_WINDOW:
        filled["original_max_position_embeddings"] = base
    if kind == "llama3":
        filled |= _LLAMA3
    return filled | {key: value for key, value in given.items() if value is not None}


def plain_is_none(scaling: dict[str, Any]) -> dict[str, Any] | None:
    """None for {rope_type: default}."""
    return None if scaling.get("rope_type") == "default" else scaling


def scaling_before_of(
    stage: StageConfig, model: ModelConfig, scale: ScaleConfig, added: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """The rope dict of the weights that a stage starts from: that of the nearest stage with one, or the base's."""
    while stage.predecessor is not None:
        stage = scaled(load_stage(stage.predecessor, added), model, scale, added)
        if (own := scaling_of(stage, model)) is not None:
            return plain_is_none(own)
    found: dict[str, Any] | None = model.rope_scaling
    return found


def theta_warning(run: Run) -> str | None:
    """What to tell of a theta that is too small for the run's window; None when it is not."""
    from megalong.rope.bound import bound_warning  # imports numpy, which a plan does without

    if run.rope_scaling is None:
        return bound_warning(run.theta, run.seq_length, run.model.head_dim)
    from megalong.rope.frequencies import rotary_frequencies  # imports torch

    inv_freq, _ = rotary_frequencies(
        run.theta,
        run.model.head_dim,
        run.rope_scaling,
        max_position_embeddings=run.seq_length,
        sequence_length=run.seq_length,
    )
    return bound_warning(run.theta, run.seq_length, run.model.head_dim, inv_freq.tolist())
