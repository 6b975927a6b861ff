"""The sequences that a run trains and is judged on: opened and checked at the start, then fed to this rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from megatron.core import parallel_state

from megalong.data.builtin import builtin_corpus
from megalong.data.cursor import Cursor
from megalong.data.loader import MicroBatch, training_batches
from megalong.data.order import shuffled_samples
from megalong.data.same_tokenizer import check_tokenizer
from megalong.data.windows import Part, Windows, open_windows
from megalong.run import Run
from megalong.runtime.errors import ConfigError, DataError

CACHE = Path.home() / ".cache" / "megalong"
NAMED = 64
"""Sequences that a message lists."""


class Sequences(NamedTuple):
    """What a run reads."""

    train: Windows
    held_out: Windows | None
    """For the loss by position; None: it is not measured."""


def choose_data(run: Run) -> tuple[Run, list[str]]:
    """The run with a data folder: its own, or at mini scale a small corpus of real text.

    Returns:
        and what the user should know of it.

    Raises:
        ConfigError: a real stage without `data.path`.
    """
    if run.config.data.path is not None:
        return run, []
    if run.config.scale.name == "full":
        raise ConfigError(
            f"data.path is missing. Stage {run.config.stage.name} needs sequences of {run.seq_length:,} "
            "tokens: make them with `python tools/prepare_data.py`, then give data.path=<its folder>."
        )
    folder = builtin_corpus(CACHE, run.seq_length, run.model.vocab_size)
    return run.reading(folder), [f"no data.path: Python sources of this machine, in {folder}"]


def open_data(
    run: Run, announce: list[str], tokenizer_dir: Path | None = None, *, whole: bool = True
) -> tuple[Run, Sequences]:
    """Open the training and the held-out sequences.

    Args:
        announce: receives what the user should know.
        tokenizer_dir: folder with the tokenizer that the weights came with; None: they came with none.
        whole: all steps of the run are going to be done.

    Returns:
        the run, now with its data folder, and what is in it.

    Raises:
        ConfigError: a real stage without `data.path`.
        DataError: the folder is missing, damaged, cut for another window, made with another tokenizer, or too small.
    """
    stands_in = run.config.data.path is None
    run, told = choose_data(run)
    announce += told
    settings, rows = run.config.data, run.model.vocab_size
    path = str(settings.path)

    def opened(split: str, at_least: int) -> Windows:
        return open_windows(path, split, seq_length=run.seq_length, vocab_size=rows, min_samples=at_least)

    train = opened("train", run.global_batch_size)
    if len(train.parts) > 1 and run.config.attention.backend == "transformer_engine":
        raise ConfigError(
            f"{path} has sequences of several windows, packed ones among them, which attention has to keep apart: "
            "attention.backend=transformer_engine does not; use backend=megalong."
        )
    if tokenizer_dir is not None:
        used = train.main.manifest.tokenizer
        differs = check_tokenizer(used, path, tokenizer_dir, rows, settings.allow_tokenizer)
        announce += [differs] if differs else []
    for part, steps in zip(train.parts, train.steps_of(run.steps), strict=True):
        there, wanted = len(part.dataset), steps * run.global_batch_size * part.rows
        if whole and wanted > there:
            if not stands_in and wanted > settings.max_passes * there:
                raise DataError(_too_few(run, part, steps, wanted))
            announce.append(
                f"{part.dataset.folder} has {there:,} sequences and the run takes {wanted:,}: each is read "
                f"{wanted / there:.1f} times on average"
            )
        if part.rows > 1:
            announce.append(
                f"{steps:,} of {run.steps:,} steps read sequences of {part.window:,} tokens, packed to the window"
            )
    return run, Sequences(train, opened("eval", settings.eval_sequences) if settings.eval_sequences else None)


def _too_few(run: Run, part: Part, steps: int, wanted: int) -> str:
    stage, there = run.config.stage.name, len(part.dataset)
    passes = -(-wanted // there)
    return (
        f"{part.dataset.folder} has {there:,} sequences, and {steps} steps of {run.global_batch_size * part.rows} take "
        f"{wanted:,}: {wanted - there:,} are missing. Make as many as the stage takes with "
        f"`python tools/prepare_data.py +stage={stage} data.source=... data.out=...`, or say with "
        f"data.max_passes={passes} that each may be read up to {passes} times."
    )


def batches_from(run: Run, train: Windows, cursor: Cursor, step: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches from `cursor` on, after `step` steps, without end."""
    return training_batches(
        train,
        cursor=cursor,
        seed=run.config.seed,
        step=step,
        micro_batches=run.micro_batches,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=run.layout.dp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=run.layout.cp,
        document_mask=run.config.attention.document_mask,
        loader=run.config.data.loader,
    )


def named_samples(run: Run, train: Windows, cursor: Cursor, step: int) -> str:
    """Which sequences step `step` (counted from 0) trains on, which begins at `cursor`."""
    first, count, number = cursor.consumed_samples, run.global_batch_size, train.part_of(step)
    part = train.parts[number]
    samples = shuffled_samples(
        sequences=len(part.dataset),
        seed=run.config.seed,
        consumed_samples=cursor.consumed_of(number),
        dp_rank=0,
        dp_size=1,
        rows=part.rows,
    )
    ids = [i for sample in islice(samples, count) for i in sample]
    named = ", ".join(map(str, ids[:NAMED])) + (f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else "")
    return f"Samples {first} to {first + count - 1} of the run: sequences {named} of {part.dataset.folder}."
