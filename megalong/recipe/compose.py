"""How do command-line overrides become one complete `Config`? Hydra composes conf/, dataclasses make it strict.

`compose` is the only way in: it selects the stage, applies the scale, derives theta, fills in the layout for the
number of ranks and runs the checks across groups. No process group and no model exists yet when it speaks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalong.config.schema import Config, StageConfig
from megalong.recipe import checks
from megalong.recipe.layout import resolve_layout
from megalong.recipe.stages import CONF, drop_published_theta, load_stage, scaled_window, stage_names, theta_of
from megalong.runtime.errors import ConfigError


def compose(overrides: Sequence[str], world_size: int | None = None) -> Config:
    """The complete configuration of a run.

    Args:
        overrides: Hydra overrides such as `+stage=65k`, `+scale=mini`, `topology.cp=4`.
        world_size: ranks that were started; None: as many as the layout wants (planning).

    Returns:
        a `Config` in which every optional field that has a rule is filled in.

    Raises:
        ConfigError: no stage, an unknown key or value, values that contradict each other.
        LayoutError: the layout does not fit the ranks, the model or the window.
        ThetaError: theta does not follow from the law.
    """
    config = _typed(_with_hydra(list(overrides)))
    _apply_scale(config)
    checks.check_values(config)
    config.stage.theta = theta_of(config.stage, config.model, config.scale)
    resolve_layout(config, world_size)
    checks.check_layout(config)
    if config.run_dir is None:
        suffix = "" if config.scale.name == "full" else f"-{config.scale.name}"
        config.run_dir = f"runs/{config.stage.name}{suffix}"
    return config


def from_yaml(text: str) -> Config:
    """Read back a `config.yaml` that a run wrote (strict, nothing is derived again)."""
    return _typed(OmegaConf.create(text))


def to_yaml(config: Config) -> str:
    """The resolved configuration as text, for `config.yaml` and for checkpoints."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _with_hydra(overrides: list[str]) -> Any:
    overrides = ["+" + o if o.startswith(("stage=", "scale=")) else o for o in overrides]
    if not any(o.startswith("+stage=") for o in overrides):
        names = stage_names()
        lines = [f"  +stage={n:<6} window {load_stage(n).seq_length:>9,} tokens" for n in names]
        raise ConfigError(
            "Which stage? Add one of\n"
            + "\n".join(lines)
            + "\nand +scale=mini to walk it on any machine without a GPU."
        )
    ConfigStore.instance().store(name="schema", node=Config)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("pretrain", overrides=overrides)
    except HydraException as error:
        raise ConfigError(_explain(error, overrides)) from error


def _typed(tree: Any) -> Config:
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(Config), tree)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, [])) from error
    assert isinstance(config, Config)
    return config


def _explain(error: Exception, overrides: list[str]) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    cause = str(error.__cause__).strip().splitlines()[0] if error.__cause__ else ""
    first = lines[0] + (f" {cause}" if cause and cause not in lines[0] else "")
    if missing := re.search(r"Could not find '(\w+)/([^']*)'", first):
        there = stage_names() if missing[1] == "stage" else _choices(missing[1])
        return f"There is no {missing[1]}/{missing[2]} in conf/: choose one of {', '.join(there)}."
    hint = ""
    keys = _all_keys()
    for word in [o.lstrip("+~").split("=")[0] for o in overrides] + [getattr(error, "full_key", None) or ""]:
        if word and word not in keys and word.split(".")[0] not in ("stage", "scale"):
            close = difflib.get_close_matches(word, keys, n=3)
            hint = f"\nThere is no setting {word!r}." + (f" Did you mean {', '.join(close)}?" if close else "")
            break
    return first + hint


def _choices(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def _all_keys() -> list[str]:
    def walk(node: Any, prefix: str) -> list[str]:
        if not OmegaConf.is_dict(node):
            return [prefix]
        return [prefix] * bool(prefix) + [
            k for name in node for k in walk(OmegaConf.select(node, str(name)), f"{prefix}.{name}".lstrip("."))
        ]

    stage = StageConfig(name="", seq_length=2, predecessor=None, theta_law="", global_batch_size=1, steps=1, lr=1.0)
    return walk(OmegaConf.structured(Config(stage=stage)), "")


def _apply_scale(config: Config) -> None:
    stage, scale = config.stage, config.scale
    stage.seq_length = scaled_window(stage.seq_length, scale)
    drop_published_theta(stage, config.model, scale)
    stage.steps = max(1, stage.steps // scale.steps)
    stage.global_batch_size = max(1, stage.global_batch_size // scale.batch)
    stage.lr = scale.lr if scale.lr is not None else stage.lr
    train = config.train
    train.steps = stage.steps if train.steps is None else train.steps
    train.lr = stage.lr if train.lr is None else train.lr
    train.global_batch_size = stage.global_batch_size if train.global_batch_size is None else train.global_batch_size
