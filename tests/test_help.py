"""Every command shows its help without torch, and the example that stands in it is one that the command takes."""

from __future__ import annotations

import re
import shlex
import sys

import pytest
import typer
from typer.testing import CliRunner

from megalong import pretrain
from megalong.commands import card, convert, evaluate, find_theta, plan, prepare_data, submit, verify
from megalong.recipe.command_line import parse
from megalong.recipe.resolve import run_of
from megalong.runtime.called import as_called
from megalong.runtime.launch import Process

ON_FILES = {"card": card.app, "convert": convert.app, "evaluate": evaluate.app, "prepare_data": prepare_data.app}
ON_A_STAGE = {
    "pretrain": pretrain.main,
    "plan": plan.main,
    "verify": verify.main,
    "find_theta": find_theta.main,
}
COMMANDS = [(tool, name) for tool, app in ON_FILES.items() for name in typer.main.get_command(app).commands]  # type: ignore[attr-defined]


def example_in(text: str) -> list[str]:
    """The words of the first example, without what starts the program."""
    found = re.search(
        r"Example: (?:python|torchrun [^/]*?) (?:tools|megalong)/\w+\.py (.*?)(?:  |\n *\n|\n\S|$)", text, re.S
    )
    assert found is not None, text
    return shlex.split(" ".join(found[1].split()))


@pytest.mark.parametrize(("tool", "name"), COMMANDS)
def test_the_example_of_a_command_on_files_is_taken(tool: str, name: str) -> None:
    shown = CliRunner().invoke(ON_FILES[tool], [name, "--help"], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    words = example_in(shown.stdout)
    group = typer.main.get_command(ON_FILES[tool])
    context = group.make_context(tool, list(words))
    words = [*context._protected_args, *context.args]
    assert words[0] == name
    group.commands[name].make_context(name, words[1:])  # type: ignore[attr-defined]


@pytest.mark.parametrize("tool", ON_FILES)
def test_a_tool_on_files_shows_an_example_and_completes(tool: str) -> None:
    shown = CliRunner().invoke(ON_FILES[tool], ["--help"])
    assert shown.exit_code == 0
    assert f"Example: python tools/{tool}.py " in shown.stdout
    assert "--install-completion" in shown.stdout


@pytest.mark.parametrize("tool", ON_A_STAGE)
def test_the_example_of_a_command_on_a_stage_is_taken(
    tool: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", "--help"])
    alone = Process(0, 1, 0, "single")
    main = ON_A_STAGE[tool]
    assert (main(["--help"]) if tool in ("plan", "verify") else main(alone)) == 0  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    words = [w for w in example_in(shown) if w.partition("=")[0] not in (*find_theta.OWN, "alternatives")]
    assert run_of(parse(words).overrides).config.stage.name
    for flag in ("--cfg", "--info", "--config-dir"):
        assert flag in shown


def test_submit_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--help"]) == 0
    assert "Example: megalong-submit stage --dry-run" in capsys.readouterr().out
    assert submit.main([]) == 2


@pytest.mark.parametrize(
    ("text", "program", "checkout", "said"),
    [
        ("python tools/plan.py +stage=65k", "tools/plan.py", True, "python tools/plan.py +stage=65k"),
        ("python tools/plan.py +stage=65k", "/usr/bin/megalong-plan", True, "megalong-plan +stage=65k"),
        ("make them with tools/prepare_data.py.", "pretrain.py", False, "make them with megalong-prepare-data."),
        (
            "torchrun --nproc-per-node 4 tools/evaluate.py DIR --tp 2",
            "megalong-evaluate",
            False,
            "torchrun --nproc-per-node 4 -m megalong.commands.evaluate DIR --tp 2",
        ),
        ("torchrun megalong/pretrain.py", "megalong-pretrain", False, "torchrun -m megalong.pretrain"),
        ("python megalong/pretrain.py -m", "megalong-pretrain", False, "megalong-pretrain -m"),
    ],
)
def test_commands_are_named_as_the_reader_can_type_them(text: str, program: str, checkout: bool, said: str) -> None:
    assert as_called(text, program, checkout) == said
