"""The card of a trained model: README.md and its pictures, from what its runs wrote.

`megalong-convert megatron-to-hf` writes the same into the export.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megalong.card.card import make_card
from megalong.card.writing import write_card
from megalong.commands.options import FirstIsMeant, outcome

app = typer.Typer(
    cls=FirstIsMeant,
    help=(
        "The card of a trained model: README.md and its pictures, from what its runs wrote.\n\n"
        "Example: python tools/card.py runs/1048k --out Llama-3-8B-1048k"
    ),
)


@app.callback()
def _group() -> None:
    """One command is a group too, so that it has a help of its own."""


@app.command("write")
def write(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the last stage's run.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write to, an export; default: RUN_DIR/card.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; default: that of --out, or base-stage.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="evaluation.json of tools/evaluate.py.")] = None,
) -> None:
    """Write the card of a trained model: README.md with Hugging Face front matter, and its pictures.

    Example: python tools/card.py runs/1048k --out Llama-3-8B-1048k
    """
    called = name or (out.resolve().name if out else None)
    written = write_card(make_card(run_dir, called, evaluation), out or run_dir / "card")
    print("\n".join(str(path) for path in written))


def command() -> int:
    """`megalong-card`; exit code."""
    return outcome(app, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
