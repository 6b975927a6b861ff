"""Turn text into sequences of one window: python tools/prepare_data.py SOURCE OUT --tokenizer DIR --seq-length N."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megalong.data.prepare import prepare
from megalong.runtime.errors import EXIT_USER_ERROR, UserError


def main(
    source: Annotated[
        Path, typer.Argument(help="Text files, or .jsonl with a 'text' field (SlimPajama): file or folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Data folder to make; give it to training as data.path.")],
    tokenizer: Annotated[Path, typer.Option(help="Hugging Face directory with tokenizer.json, or that file.")],
    seq_length: Annotated[int, typer.Option(help="Window of the stage, tokens.")],
    eval_fraction: Annotated[float, typer.Option(help="Share of the documents to hold out.")] = 0.01,
    min_tokens: Annotated[int, typer.Option(help="Leave out documents shorter than this, tokens.")] = 0,
) -> None:
    """Tokenize text and pack it into sequences of one window.

    Documents longer than the window fill sequences of their own; shorter ones are laid end to end, with the places
    where they start on record. OUT appears only when it is whole.

    Example: python tools/prepare_data.py slimpajama/ data/65k --tokenizer Meta-Llama-3-8B --seq-length 65536
    """
    try:
        manifest = prepare(source, out, tokenizer, seq_length, eval_fraction=eval_fraction, min_tokens=min_tokens)
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_USER_ERROR) from error
    train, held_out = manifest.sequences("train"), manifest.sequences("eval")
    print(f"{out}: {train:,} sequences of {seq_length:,} tokens to train on, {held_out:,} held out.")


if __name__ == "__main__":
    typer.run(main)
