"""Hydra's own command line: its flags, sweeps and completion, for the trainer and every tool that is given settings.

Flags that show something (`--cfg all`, `--info`, `--hydra-help`, `--version`, shell completion) and sweeps are Hydra's
own work, done by `hydra.main`. What is trained or planned is composed by `recipe.compose`, which is stricter.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from megalong.config.schema import Config
from megalong.recipe.folders import CONF
from megalong.runtime import console
from megalong.runtime.called import as_called
from megalong.runtime.errors import ConfigError

SHOWN = ("job", "hydra", "all")
SEARCHPATH = "hydra.searchpath"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[0].upper()}{message[1:]}. --hydra-help lists Hydra's flags.")


@cache
def _parser() -> argparse.ArgumentParser:
    parser = get_args_parser()
    parser.__class__ = _Parser
    parser.allow_abbrev = False
    return parser


def flags() -> set[str]:
    """All flags of Hydra's."""
    return set(_parser()._option_string_actions) - {"-h", "--help"}


@dataclass(frozen=True)
class CommandLine:
    """A command line, taken apart."""

    words: list[str]
    """`key=value`, and whatever else is no flag of Hydra's."""
    flags: argparse.Namespace
    given: list[str]
    """All of it, as Hydra is given it."""

    @property
    def config_name(self) -> str:
        """The file that the settings begin with."""
        return self.flags.config_name or "pretrain"

    @property
    def added(self) -> list[str]:
        """Flags that belong to what is composed, as they were given; with `words` they are the overrides."""
        found = {"--config-dir": self.flags.config_dir, "--config-name": self.flags.config_name}
        return [word for name, value in found.items() if value is not None for word in (name, value)]

    @property
    def overrides(self) -> list[str]:
        """What `compose` is given."""
        return [*self.added, *self.words]

    @property
    def shows(self) -> str | None:
        """The flag that shows something instead of running, if there is one."""
        flags = self.flags
        found = {
            "--help": flags.help,
            "--hydra-help": flags.hydra_help,
            "--cfg": flags.cfg,
            "--info": flags.info,
            "--shell-completion": flags.shell_completion,
            "--multirun": flags.multirun,
        }
        return next((name for name, given in found.items() if given), None)


def parse(arguments: Sequence[str]) -> CommandLine:
    """Take a command line apart; nothing is read or shown, except for `--version`.

    Raises:
        ConfigError: a flag of Hydra's without its value, or one that cannot be used here.
    """
    words = list(arguments)
    for i, word in enumerate(words):  # `--cfg` alone has always shown the job
        if word in ("--cfg", "-c") and words[i + 1 : i + 2] not in ([kind] for kind in SHOWN):
            words[i] = "--cfg=job"
        if match := re.fullmatch(rf"({SEARCHPATH}=)([^\[].*)", word):  # Hydra wants a list
            words[i] = f"{match[1]}[{match[2]}]"
    flags, unknown = _parser().parse_known_intermixed_args(words)
    if flags.config_path is not None or flags.experimental_rerun is not None:
        raise ConfigError("--config-path and --experimental-rerun are not used here; --config-dir adds a folder.")
    if flags.config_dir is not None and not Path(flags.config_dir).is_dir():
        raise ConfigError(f"--config-dir {flags.config_dir}: there is no such folder.")
    return CommandLine([*flags.overrides, *unknown], flags, words)


def answer(
    line: CommandLine,
    help_text: str,
    show_job: Callable[[], str],
    *,
    first: bool = True,
    folder_key: str | None = None,
    foreign: Callable[[str], bool] = lambda word: False,
) -> int | None:
    """Do what a flag asks for.

    Args:
        show_job: text for `--cfg job`: what would be run.
        first: whether this rank speaks.
        folder_key: setting that a sweep gives each run a folder of its own by.
        foreign: which words are none of the trainer's, so that Hydra does not know them.

    Returns:
        exit code; None: no flag asks for anything, so run.
    """
    if line.shows is None:
        return None
    if line.flags.help:
        console.say(as_called(help_text))
        return 0
    if line.flags.cfg == "job" and not line.flags.package:
        console.say(show_job())
        return 0
    if line.flags.multirun:
        return _sweep(line, folder_key)
    if first:
        _hydra([word for word in line.given if not foreign(word)], lambda config: None)
    return 0


def _hydra(arguments: list[str], task: Callable[[Any], None]) -> None:
    """Hydra's own way through a command line."""
    ConfigStore.instance().store(name="schema", node=Config)
    sys.argv[1:] = [f"+{w}" if w.startswith(("stage=", "scale=")) else w for w in arguments]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name="pretrain")(task)()


def _sweep(line: CommandLine, folder_key: str | None) -> int:
    """One run after the other, each a process of its own; the first that fails gives the exit code, the others run."""
    codes: list[int] = []

    def job(config: Any) -> None:
        now = HydraConfig.get()
        words = [*now.overrides.task, *(w for w in line.words if w.startswith(f"{SEARCHPATH}="))]
        if folder_key is not None and not any(w.lstrip("+").startswith(f"{folder_key}=") for w in words):
            words.append(f"{folder_key}={now.runtime.output_dir}")
        print(f"\n[{now.job.num}] {' '.join(words)}", flush=True)
        codes.append(subprocess.run([*_launcher(words), sys.argv[0], *line.added, *words]).returncode)

    _hydra([*line.added, *line.words, "--multirun"], job)
    for number, code in enumerate(codes):
        print(f"[{number}] exit code {code}")
    return next((code for code in codes if code), 0)


def _launcher(words: Sequence[str]) -> list[str]:
    """A run whose parallel sizes are given has as many ranks; any other has one."""
    ranks = 1
    for word in words:
        key, _, size = word.partition("=")
        if key.lstrip("+") in ("topology.tp", "topology.cp", "topology.pp", "topology.dp") and size.isdigit():
            ranks *= int(size)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *(torchrun if ranks > 1 else [])]
