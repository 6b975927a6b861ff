"""The stages of conf/stage, the order in which they follow, and the theta of each.

The numbers of a stage live only in conf/stage/*.yaml; this module reads them and walks the chain of predecessors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megalong.config.limits import check_limits
from megalong.config.schema import ModelConfig, ScaleConfig, StageConfig
from megalong.recipe.folders import find, names
from megalong.rope.theta import RotaryPoint, stage_theta
from megalong.runtime.errors import ConfigError


def stage_names(added: Sequence[str] = ()) -> list[str]:
    """Names of all stages, shortest window first; those whose file cannot be read come last."""
    return sorted(names("stage", added), key=lambda name: (_window(name, added), name))


def _window(name: str, added: Sequence[str]) -> float:
    try:
        return load_stage(name, tuple(added)).seq_length
    except ConfigError:
        return math.inf


def stage_lines(added: Sequence[str] = ()) -> list[str]:
    """One line about each stage, for a person who has to choose."""
    lines: list[str] = []
    width = max(map(len, stage_names(added)), default=0)
    for name in stage_names(added):
        try:
            lines.append(f"  +stage={name:<{width}} window {load_stage(name, tuple(added)).seq_length:>9,} tokens")
        except ConfigError as error:
            lines.append(f"  +stage={name:<{width}} cannot be read: {error}")
    return lines


@cache
def load_stage(name: str, added: tuple[str, ...] = ()) -> StageConfig:
    """The stage as conf/stage/<name>.yaml has it, unscaled; read once.

    Args:
        added: `Config.searchpath`.

    Raises:
        ConfigError: there is no such stage, or its file holds what a stage does not know or allow.
    """
    path = find("stage", name, added)
    if path is None:
        raise ConfigError(f"No stage {name!r}; conf/stage has: {', '.join(names('stage', added))}.")
    try:
        _require_keys(path)
        stage: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StageConfig), OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no stage: {' '.join(str(error).split('full_key')[0].split())}") from error
    assert isinstance(stage, StageConfig)
    check_limits(stage, "stage.", str(path))
    return stage


def lineage(name: str, added: tuple[str, ...] = ()) -> list[str]:
    """A stage and those before it, first to last.

    Raises:
        ConfigError: no such stage.
    """
    before = load_stage(name, added).predecessor
    return [*(lineage(before, added) if before else ()), name]


def _require_keys(path: Path) -> None:
    """Every key that a stage cannot do without stands in its file, or in a file that this one builds on.

    Raises:
        ConfigError: naming the file and the keys.
    """
    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig) or "defaults" in tree:
        return
    required = [f.name for f in fields(StageConfig) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in tree]:
        raise ConfigError(f"{path} is no stage: it does not say {', '.join(missing)}.")


def scaled(stage: StageConfig, model: ModelConfig, scale: ScaleConfig, added: tuple[str, ...] = ()) -> StageConfig:
    """A stage after the scale's divisors; its published theta is left out where it does not apply.

    Raises:
        ConfigError: the divisor does not divide the window.
    """
    if stage.seq_length % scale.window:
        unit = 16 * scale.window  # such a window is left with chunks for small rings, whatever tp is
        below = max(unit, stage.seq_length // unit * unit)
        raise ConfigError(
            f"stage.seq_length={stage.seq_length}: scale.window={scale.window}, which divides every window, does not "
            f"divide it. Near it are stage.seq_length={below} and stage.seq_length={below + unit}."
        )
    return replace(
        stage,
        seq_length=stage.seq_length // scale.window,
        steps=max(1, stage.steps // scale.steps),
        global_batch_size=max(1, stage.global_batch_size // scale.batch),
        lr=stage.lr if scale.lr is None else scale.lr,
        theta=None if _is_published(stage, added) and _is_reshaped(model, scale) else stage.theta,
    )


def predecessor_point(
    stage: StageConfig, model: ModelConfig, scale: ScaleConfig, added: tuple[str, ...] = ()
) -> RotaryPoint:
    """Theta and window of the checkpoint that a stage starts from: the base's, or those of the stages in between."""
    if stage.predecessor is None:
        return RotaryPoint(model.rope_theta, model.max_position_embeddings)
    before = scaled(load_stage(stage.predecessor, added), model, scale, added)
    return RotaryPoint(theta_of(before, model, predecessor_point(before, model, scale, added)), before.seq_length)


def theta_of(stage: StageConfig, model: ModelConfig, before: RotaryPoint) -> float:
    """Theta of a scaled stage by its own law.

    Args:
        before: `predecessor_point` of the stage.

    Raises:
        ThetaError: the declared theta contradicts the law, or the law does not apply.
    """
    return stage_theta(
        stage.theta_law,
        window=stage.seq_length,
        head_dim=model.head_dim,
        base=RotaryPoint(model.rope_theta, model.max_position_embeddings),
        previous=before,
        factor=stage.theta_factor,
        declared=stage.theta,
    )


def _is_published(stage: StageConfig, added: tuple[str, ...]) -> bool:
    """Whether a stage's theta follows from its law, and is the one in its file; what a user wrote is checked."""
    known = find("stage", stage.name, added) is not None
    return stage.theta_law != "fixed" and known and stage.theta == load_stage(stage.name, added).theta


def _is_reshaped(model: ModelConfig, scale: ScaleConfig) -> bool:
    """Whether the thetas written in conf/stage, for Llama-3's base and the full window, do not apply."""
    llama3 = (500000.0, 8192, 128)
    return scale.window > 1 or (model.rope_theta, model.max_position_embeddings, model.head_dim) != llama3
