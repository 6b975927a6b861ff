"""A command line becomes the job of one stage's data: `data.*` is of the data, every other word of the run.

The stage says window, steps and sequences per step, exactly as it says them to training: the same words can be given
to both. Recipes of data are a Hydra group of their own, conf/prepare/data.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megalong.data.pipeline.job import Job
from megalong.data.pipeline.settings import Settings
from megalong.data.same_tokenizer import check_tokenizer
from megalong.data.tokenizer import load_tokenizer
from megalong.recipe.command_line import parse
from megalong.recipe.compose import searched
from megalong.recipe.folders import all_folders, names
from megalong.recipe.resolve import run_of
from megalong.runtime import console
from megalong.runtime.errors import ConfigError

RECIPES = "prepare"
"""Folder of conf/, and of folders that a user adds, with recipes of data in `data/`."""


@dataclass
class _Root:
    data: Settings = field(default_factory=Settings)


def recipe_names(added: Sequence[str] = ()) -> list[str]:
    """What `data=` can choose.

    Args:
        added: folders that files are taken from, if not from conf/ alone.
    """
    return names(f"{RECIPES}/data", added)


def is_of_data(word: str) -> bool:
    """Whether a word is of the data, and means nothing to training."""
    key = word.lstrip("+~").partition("=")[0]
    # `data.allow_tokenizer` and its like mean the same to both
    return key.partition(".")[0] == "data" and key not in ("data.allow_tokenizer", "data.path", "data.loader")


def job_of(words: Sequence[str], workers: int | None = None) -> Job:
    """The job that a command line asks for.

    Args:
        words: such as `+stage=1048k`, `data=upsampled`, `data.source=slimpajama/`, `init_from=Meta-Llama-3-8B`.
        workers: processes; None: one for each core.

    Raises:
        ConfigError: an unknown key or value, no stage, no tokenizer.
        DataError: the tokenizer is not the model's.
    """
    line = parse(words)
    settings = read_settings([w for w in line.words if is_of_data(w)], searched(line))
    run = run_of([*line.added, *(w for w in line.words if not is_of_data(w))])
    config = run.config
    named = settings.tokenizer or config.init_from
    if named is None:
        raise ConfigError("Give data.tokenizer=DIR (with tokenizer.json), or init_from=DIR: the model's own is used.")
    if settings.out is None:
        suffix = "" if config.scale.name == "full" else f"-{config.scale.name}"
        settings.out = f"data/{config.stage.name}{suffix}"
    _scale_windows(settings, config.scale.window)
    tokenizer, model = Path(named), Path(config.init_from) if config.init_from else None
    info = load_tokenizer(tokenizer).info
    if model is not None and model != tokenizer:
        told = check_tokenizer(info, "data.tokenizer", model, run.model.vocab_size, config.data.allow_tokenizer)
        console.warn(told) if told else None
    if info.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"{tokenizer} has {info.vocab_size:,} tokens and the model of this stage {run.model.vocab_size:,} rows: "
            "it is not the model's tokenizer. Give that one, or say model=... as to training."
        )
    return Job(
        settings=settings,
        tokenizer=tokenizer,
        stage=config.stage.name,
        seq_length=run.seq_length,
        sequences=run.steps * run.global_batch_size,
        seed=config.seed,
        workers=workers or len(os.sched_getaffinity(0)),
        batch=run.global_batch_size,
    )


def _scale_windows(settings: Settings, divisor: int) -> None:
    """Windows of the mix, as the stage's is scaled."""
    for i, band in enumerate(settings.mix):
        if band.window is None:
            continue
        if band.window % divisor:
            raise ConfigError(f"data.mix[{i}].window={band.window}: scale.window={divisor} does not divide it.")
        band.window //= divisor


def read_settings(words: Sequence[str], added: Sequence[str] = ()) -> Settings:
    """The settings of `data=RECIPE` and `data.key=value`.

    Args:
        added: folders that recipes are taken from, if not from conf/ alone.

    Raises:
        ConfigError: an unknown recipe, key or value.
    """
    texts: dict[str, str | None] = {}
    for_hydra: list[str] = []
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if key == "data" and value not in (known := recipe_names(added)):
            raise ConfigError(f"There is no recipe of data {value!r}: choose one of {', '.join(known)}.")
        if key != "data":
            _refuse_unknown(key)
        if key in _text_keys() or key.startswith("data.sources."):
            texts[key.removeprefix("data.")] = None if value == "null" else value
        else:
            for_hydra.append(f"{'' if key == 'data' else '++'}{key}={value}")  # ++: names of sources are new keys
    store = ConfigStore.instance()
    store.store(name="prepare_schema", node=_Root)
    store.store(name="prepare", node={"defaults": ["prepare_schema", {"data": None}, "_self_"]})
    try:
        roots = [str(f / RECIPES) for f in all_folders(added) if (f / RECIPES).is_dir()]
        if len(roots) > 1:
            for_hydra.append(f"hydra.searchpath={[f'file://{root}' for root in roots[1:]]}")
        with initialize_config_dir(roots[0], version_base="1.3"):
            composed = hydra_compose("prepare", overrides=for_hydra)
        root: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_Root), composed))
    except (HydraException, OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"data: {str(error).strip().splitlines()[0]}") from error
    settings: Settings = root.data
    for name, text in texts.items():
        if name.startswith("sources."):
            settings.sources[name.removeprefix("sources.")] = text or ""
        else:
            setattr(settings, name, text)
    return settings


def _text_keys() -> set[str]:
    hints = get_type_hints(Settings)
    return {
        f"data.{f.name}" for f in fields(Settings) if hints[f.name] in (str, str | None) and "choices" not in f.metadata
    }


def _refuse_unknown(key: str) -> None:
    known = {f.name for f in fields(Settings)}
    name = key.split(".")[1]
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=2)
        hint = f" Did you mean {' or '.join(f'data.{c}' for c in close)}?" if close else ""
        raise ConfigError(f"There is no setting {key}.{hint} All: megalong/data/pipeline/settings.py.")
