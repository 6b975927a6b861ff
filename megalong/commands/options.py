"""How does a command that works on files read its options? With typer: help, completion, and one message for a mistake.

The first command of such a program is the one that is meant where none is named.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from megalong.runtime.called import as_called
from megalong.runtime.errors import EXIT_OK, ConfigError, UserError

USAGE: Any = typer.BadParameter.__base__
"""typer's UsageError, which has no public name of its own."""


class FirstIsMeant(TyperGroup):
    """A group of commands whose first one need not be named."""

    def meant(self, words: list[str]) -> str:
        """The command that is meant by words that begin with none."""
        return next(iter(self.commands))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = [self.meant(args), *args]
        return super().parse_args(ctx, args)


def ask(app: typer.Typer, words: list[str], first: bool = True) -> Any:
    """What a command returns for these words: its exit code, or what it was asked for.

    Args:
        words: of the command line; none of them: the help.
        first: whether this rank shows the help.

    Raises:
        ConfigError: an option that is unknown, missing or has no such value.
    """
    command: Any = typer.main.get_command(app)
    for each in (command, *getattr(command, "commands", {}).values()):
        each.help = as_called(each.help or "")
    program = Path(sys.argv[0]).name
    try:
        with contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO()):
            return command.main(words or ["--help"], prog_name=program, standalone_mode=False)
    except USAGE as error:
        raise ConfigError(f"{error.format_message()} See {program} --help.") from error


def outcome(app: typer.Typer, words: list[str]) -> int:
    """Run what the words ask for, on one process; exit code."""
    try:
        return int(ask(app, words) or EXIT_OK)
    except UserError as error:
        print(as_called(str(error)), file=sys.stderr)
        return error.exit_code
