"""What can a checkpoint do with its window? Needles, documents and short texts, by one forward pass each.

What is scored: docs/evaluation.md.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from megalong.commands.evaluating import evaluate, sample
from megalong.commands.options import FirstIsMeant, ask
from megalong.config.schema import QUESTIONS
from megalong.runtime import console, launch

TASKS = ",".join(QUESTIONS)

app = typer.Typer(
    cls=FirstIsMeant,
    help=(
        "What can a checkpoint do with its window? Needles, documents and short texts, by one forward pass each.\n\n"
        "What is scored: docs/evaluation.md. Several checkpoints are set side by side.\n\n"
        "Example: python tools/evaluate.py runs/1048k Llama-3-8B-1048k --documents books/\n\n"
        "On several ranks: torchrun --nproc-per-node 4 tools/evaluate.py runs/1048k --tp 2 --cp 2"
    ),
)


class Communication(StrEnum):
    """How context-parallel ranks exchange keys and values."""

    p2p = "p2p"
    a2a = "a2a"
    all_gather = "all_gather"


class Precision(StrEnum):
    """What weights and activations are held in."""

    bf16 = "bf16"
    fp32 = "fp32"


Tp = Annotated[int, typer.Option(help="Tensor-parallel size.")]
Cp = Annotated[int, typer.Option(help="Context-parallel size.")]
Pp = Annotated[int, typer.Option(help="Pipeline-parallel size; what is left is data parallel.")]
Exchange = Annotated[Communication, typer.Option(help="How context-parallel ranks exchange keys and values.")]
Numbers = Annotated[Precision, typer.Option(help="What weights and activations are held in.")]
Haystack = Annotated[Path | None, typer.Option(help="Your own text, file or folder; default: text of megalong.")]
Repeat = Annotated[bool, typer.Option("--repeat", help="Read your text again where it is too short.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of the tokenizer; default: the checkpoint's own.")]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="Write prompts by the chat template; default: where there is one."),
]
Seed = Annotated[int, typer.Option(help="Decides what is asked.")]


@app.command("score")
def score_command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Hugging Face directory, Megatron checkpoint, run_dir.")],
    tasks: Annotated[str, typer.Option(help="Of these; none: no questions.")] = TASKS,
    lengths: Annotated[
        str | None,
        typer.Option(help="Tokens, such as 4096,16384; default: the largest window and its halves down to 1/8."),
    ] = None,
    depths: Annotated[str, typer.Option(help="Where the answer stands: 0 at the beginning.")] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help="Of every length and depth.")] = 3,
    documents: Annotated[
        Path | None, typer.Option(help="Long documents: text, .jsonl, or a data folder (held-out part).")
    ] = None,
    count: Annotated[int, typer.Option(help="Long documents, and short ones.")] = 4,
    window: Annotated[
        int | None, typer.Option(help="Length of the long documents; default: the largest window.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The base model: its loss on short documents is set beside.")
    ] = None,
    base_window: Annotated[
        int | None, typer.Option(help="Tokens of a short document; default: the base's window.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for JSON, PNG and TensorBoard file.")] = Path("outputs/evaluation"),
    tp: Tp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    cp_comm_type: Exchange = Communication.p2p,
    precision: Numbers = Precision.bf16,
    haystack: Haystack = None,
    repeat: Repeat = False,
    tokenizer: Tokenizer = None,
    chat: Chat = None,
    seed: Seed = 0,
) -> Any:
    """Score checkpoints side by side; `score` need not be said.

    Example: python tools/evaluate.py runs/1048k --tasks needle,passkey --lengths 65536,1048576
    """
    return evaluate, SimpleNamespace(**locals())


@app.command("sample")
def sample_command(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face directory, Megatron checkpoint, run_dir.")],
    length: Annotated[int | None, typer.Option(help="Tokens of the prompt; default: half the window.")] = None,
    depth: Annotated[float, typer.Option(help="Where the answer stands: 0 at the beginning.")] = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 24,
    task: Annotated[str, typer.Option(help="What is asked.")] = "needle",
    tp: Tp = 1,
    cp: Cp = 1,
    pp: Pp = 1,
    cp_comm_type: Exchange = Communication.p2p,
    precision: Numbers = Precision.bf16,
    haystack: Haystack = None,
    repeat: Repeat = False,
    tokenizer: Tokenizer = None,
    chat: Chat = None,
    seed: Seed = 0,
) -> Any:
    """Print what the model writes, greedily, behind a needle at a given depth.

    Example: python tools/evaluate.py sample runs/1048k --length 4096 --depth 0.5
    """
    return sample, SimpleNamespace(**locals())


def main(process: launch.Process) -> int:
    """Evaluate, or write a sample; returns the exit code."""
    console.speak_only_from(process.is_first)
    asked = ask(app, sys.argv[1:], process.is_first)
    if not isinstance(asked, tuple):  # help was shown
        return int(asked or 0)
    work, given = asked
    with console.gathered_notices("torch and megatron-core"):
        from megalong.runtime import device

        device.install()
        import megalong.evaluation.checkpoint  # noqa: F401 - its notices belong here
    console.quiet_libraries()
    code: int = work(process, given)
    return code


def command() -> int:
    """`megalong-evaluate`; exit code."""
    return launch.run(main)


if __name__ == "__main__":
    sys.exit(command())
