"""Which stages are there, in which order do they follow, and what theta does each one have?

The numbers of a stage live only in conf/stage/*.yaml; this module reads them and walks the chain of predecessors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megalong.config.schema import ModelConfig, ScaleConfig, StageConfig
from megalong.rope.theta import RotaryPoint, stage_theta
from megalong.runtime.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"


def stage_names() -> list[str]:
    """Names of all stages in conf/stage, shortest window first."""
    return sorted((p.stem for p in (CONF / "stage").glob("*.yaml")), key=lambda n: load_stage(n).seq_length)


def load_stage(name: str) -> StageConfig:
    """The stage as conf/stage/<name>.yaml has it, unscaled.

    Raises:
        ConfigError: there is no such stage.
    """
    path = CONF / "stage" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"No stage {name!r}; conf/stage has: {known}.")
    tree: Any = OmegaConf.merge(OmegaConf.structured(StageConfig), OmegaConf.load(path))
    stage = OmegaConf.to_object(tree)
    assert isinstance(stage, StageConfig)
    return stage


def scaled_window(seq_length: int, scale: ScaleConfig) -> int:
    """Window in tokens after the scale's divisor.

    Raises:
        ConfigError: the divisor does not divide the window.
    """
    if scale.window < 1 or seq_length % scale.window:
        raise ConfigError(f"scale.window={scale.window} does not divide the window of {seq_length} tokens.")
    return seq_length // scale.window


def base_point(model: ModelConfig) -> RotaryPoint:
    """Theta and window of the base model."""
    return RotaryPoint(model.rope_theta, model.max_position_embeddings)


def predecessor_point(stage: StageConfig, model: ModelConfig, scale: ScaleConfig) -> RotaryPoint:
    """Theta and window of the checkpoint that a stage starts from."""
    if stage.predecessor is None:
        return base_point(model)
    before = load_stage(stage.predecessor)
    before.seq_length = scaled_window(before.seq_length, scale)
    if before.theta_law != "fixed" and _is_reshaped(model, scale):
        before.theta = None
    return RotaryPoint(theta_of(before, model, scale), before.seq_length)


def theta_of(stage: StageConfig, model: ModelConfig, scale: ScaleConfig) -> float:
    """Theta of a stage whose seq_length is already scaled, by its own law.

    Raises:
        ThetaError: the declared theta contradicts the law, or the law does not apply.
    """
    return stage_theta(
        stage.theta_law,
        window=stage.seq_length,
        head_dim=model.head_dim,
        base=base_point(model),
        previous=predecessor_point(stage, model, scale),
        factor=stage.theta_factor,
        declared=stage.theta,
    )


def _is_reshaped(model: ModelConfig, scale: ScaleConfig) -> bool:
    """Whether the thetas written in conf/stage, for Llama-3's base and the full window, do not apply."""
    return scale.window > 1 or (model.rope_theta, model.max_position_embeddings, model.head_dim) != (
        500000.0,
        8192,
        128,
    )


def drop_published_theta(stage: StageConfig, model: ModelConfig, scale: ScaleConfig) -> None:
    """Forget the published theta where it does not apply; one that the user wrote stays, and is checked."""
    if stage.theta_law == "fixed" or stage.name not in stage_names() or not _is_reshaped(model, scale):
        return
    if stage.theta == load_stage(stage.name).theta:
        stage.theta = None
