"""Command-line overrides become one `Config`: Hydra composes conf/, dataclasses make it strict.

What follows from it for a number of ranks (scale, theta, layout) is `recipe.resolve`'s.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from megalong.config.schema import Config
from megalong.recipe.command_line import CommandLine, parse
from megalong.recipe.folders import CONF
from megalong.recipe.hardware import AUTO, from_file, this_machine, with_cluster
from megalong.recipe.keys import is_setting, no_such
from megalong.recipe.overrides import Overrides, read
from megalong.recipe.stages import load_stage, stage_lines
from megalong.runtime.errors import ConfigError

_KINDS = {"integer": "a whole number", "float": "a number", "boolean": "true or false"}


def compose(overrides: Sequence[str], world_size: int | None = None) -> Config:
    """What the user said.

    Args:
        overrides: words such as `+stage=65k`, `+scale=mini`, `topology.cp=4`; how they are read: `recipe.overrides`.
        world_size: ranks that were started, for `cluster=auto`; None: as many as the layout wants (planning).

    Raises:
        ConfigError: no stage, an unknown key, or a value of another type.
    """
    line = parse(overrides)
    if line.shows is not None:
        raise ConfigError(f"{line.shows} cannot be used here.")
    added = searched(line)
    given = read(line.words, added)
    if given.groups.get("cluster") == AUTO:
        given = with_cluster(given, this_machine(world_size), added)
    elif given.groups.get("cluster", "").endswith((".yaml", ".yml")):
        given = from_file(given, added)
    try:
        return _composed(given, line)
    except ConfigError:
        if "stage" in given.groups:
            load_stage(given.groups["stage"], tuple(added))  # where the file is what is wrong, this names it
        raise


def _composed(given: Overrides, line: CommandLine) -> Config:
    tree, folders = _tree(given, line)
    if not isinstance(tree.get("stage"), dict) or "name" not in tree["stage"]:
        raise ConfigError(_which_stage(folders))
    tree["searchpath"] = folders
    _as_said(tree, given)
    if tree.get("run_dir") is None and "hydra.run.dir" in given.hydra:
        tree["run_dir"] = parsed(f"hydra.run.dir={given.hydra['hydra.run.dir']}")
    return _typed(tree)


def from_yaml(text: str) -> Config:
    """Read back a `config.yaml` that a run wrote (strict, nothing is derived again).

    Settings that did not exist when it was written have their defaults.

    Raises:
        ConfigError: it is none, or it holds what this version does not know.
    """
    try:
        tree = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"this is no config.yaml: {' '.join(str(error).split())}") from error
    return _typed(tree)


def to_yaml(config: Config) -> str:
    """A configuration as text, for `config.yaml` and for checkpoints."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(asdict(config))))


def _which_stage(folders: Sequence[str]) -> str:
    lines = stage_lines(folders)
    return "Which stage? Add one of\n" + "\n".join(lines) + "\nand +scale=mini to walk it on any machine without a GPU."


def searched(line: CommandLine) -> list[str]:
    """The folders that a command line itself names, and conf/; [] for conf/ alone.

    Raises:
        ConfigError: one of them is not there.
    """
    front = [str(Path(line.flags.config_dir).resolve())] if line.flags.config_dir else []
    behind = [folder for word in line.words if word.startswith("hydra.searchpath=") for folder in parsed(word)]
    behind = [str(Path(str(folder).removeprefix("file://")).resolve()) for folder in behind]
    for folder in behind:
        if not Path(folder).is_dir():
            raise ConfigError(f"hydra.searchpath: there is no folder {folder}.")
    return [*front, str(CONF), *behind] if front or behind else []


def _as_said(tree: dict[str, Any], given: Overrides) -> None:
    """What a command line says of a stage at a scale is meant at that scale: `stage.steps=3 +scale=mini` are 3 steps.
    A scale divides what it finds (`stages.scaled`), so it finds the product."""
    stage, scale = tree["stage"], tree["scale"]
    for word in given.values:
        key = word.lstrip("+").partition("=")[0].removeprefix("stage.")
        if word.lstrip("+").startswith(("stage.steps=", "stage.global_batch_size=")) and isinstance(stage[key], int):
            stage[key] *= scale["batch" if key == "global_batch_size" else key] if stage[key] > 0 else 1
        elif word.lstrip("+").startswith("stage.lr="):
            scale["lr"] = None


def parsed(word: str) -> Any:
    """The value of an override in Hydra's grammar; [] where it is none that can be read."""
    try:
        found = OverridesParser.create().parse_overrides([word])[0].value()
    except HydraException:
        return []  # told with all other mistakes by `overrides.read`
    return found if found is not None else []


def _tree(given: Overrides, line: CommandLine) -> tuple[Any, list[str]]:
    """The settings as plain values, and the folders that they are from ([]: conf/ alone): what Hydra composes, and the
    texts of the command line, which it never sees."""
    ConfigStore.instance().store(name="schema", node=Config)
    version.setbase("1.3")
    search = create_config_search_path(str(CONF))
    if line.flags.config_dir is not None:
        search.prepend("command-line", f"file://{Path(line.flags.config_dir).resolve()}")
    GlobalHydra.instance().clear()
    try:
        hydra = Hydra.create_main_hydra2("megalong", search)
        composed = hydra.compose_config(
            line.config_name, given.for_hydra, run_mode=RunMode.RUN, from_shell=False, with_log_configuration=False
        )
        sources = [s.path for s in composed.hydra.runtime.config_sources if s.schema == "file" and s.path]
        with open_dict(composed):
            del composed["hydra"]
        tree: Any = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError, RecursionError) as error:
        raise ConfigError(_explain(error)) from error
    finally:
        GlobalHydra.instance().clear()
    filled = {key: text if text is None else _filled_in(key, text, tree) for key, text in given.texts.items()}
    for key, text in filled.items():
        *path, name = key.split(".")
        node = tree
        for part in path:
            node = node[part]
        node[name] = text
    return _literal(tree), sources if sources != [str(CONF)] else []


def _filled_in(key: str, text: str, tree: Any) -> str:
    """Replace each `${setting}` in a text by that setting's value."""

    def value(match: re.Match[str]) -> str:
        if not is_setting(match[1]):
            return match[0]
        found = tree
        for part in match[1].split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None or isinstance(found, dict | list):
            raise ConfigError(f"{key}={text}: {match[1]} has no value of its own that could stand there.")
        return str(found)

    return re.sub(r"\$\{([\w.]+)\}", value, text)


def _literal(tree: Any) -> Any:
    """The tree with every `${` of its strings marked as text: OmegaConf would take it for a reference."""
    if isinstance(tree, dict):
        return {key: _literal(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_literal(value) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", tree)
    return tree


def _typed(tree: Any) -> Config:
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(_explain(error)) from error
    assert isinstance(config, Config)
    return config


def _explain(error: BaseException) -> str:
    """What a composition failed of, in one or two lines: its own words end with a page of Hydra's."""
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())  # it names the file and the line
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    first = lines[0]
    cause = str(error.__cause__).strip().splitlines()[0] if error.__cause__ and str(error.__cause__).strip() else ""
    if re.match(r"In '[\w/]+': \w+ raised while composing config:", lines[0]):
        first = " ".join(lines[:2])
    if said := re.match(r"Error merging override (\S+?=.*)", lines[0]):  # Hydra's words for a value of another type
        wanted = re.search(r"could not be converted to (\w+)", cause)
        kind = _KINDS.get(wanted[1].lower(), wanted[1]) if wanted else None
        return f"{said[1]}: " + (f"{kind} is needed here." if kind else f"this cannot stand here. {cause}".strip())
    first += f" {cause}" if cause and cause not in first else ""
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    return f"{first}\n{no_such(key)}" if key and not is_setting(key) else first
