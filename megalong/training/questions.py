"""What is a run asked besides its held-out sequences? Questions and short texts, drawn once, the same every time.

The questions are those that tools/evaluate.py asks with the same tokenizer, tasks, lengths and depths. The first rank
alone has the tokenizer's files, which travel with the weights; it draws, and the others are sent the tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalong.config.schema import Config
from megalong.data.windows import Windows
from megalong.evaluation.documents import short_pieces
from megalong.evaluation.evaluate import Material
from megalong.evaluation.haystack import read_haystack
from megalong.evaluation.suite import Grid, Suite, make_suite
from megalong.evaluation.tokens import PromptTokenizer
from megalong.run import Run
from megalong.runtime.console import say
from megalong.runtime.errors import ConfigError, DataError
from megalong.runtime.watchdog import enter

TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def check_haystack(config: Config) -> None:
    """The text that answers are to be hidden in is there.

    Raises:
        ConfigError: it is not.
    """
    path = config.evaluation.haystack
    if path is not None and not Path(path).exists():
        raise ConfigError(f"evaluation.haystack={path}: there is no such file or folder.")


def base_window(run: Run) -> int:
    """Tokens that short texts are cut to: the base model's window, or the stage's own where that is shorter."""
    return min(run.model.max_position_embeddings, run.seq_length)


def draw(run: Run, carried: Mapping[str, bytes], held_out: Windows) -> Material:
    """Draw the questions and cut the short texts; every rank calls this. What cannot be asked is said in one line.

    Args:
        carried: files that came with the weights, on the first rank.
    """
    enter("drawing questions")
    sent: list[Any] = [_questions(run, carried) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(sent, 0)
    suite, left_out = sent[0]
    if left_out:
        say(f"left out of the evaluation: {'; '.join(left_out)}")
    short = short_pieces(held_out.main, run.config.data.eval_sequences, base_window(run))
    return Material(suite, short=short, base_window=base_window(run))


def _questions(run: Run, carried: Mapping[str, bytes]) -> tuple[Suite, list[str]]:
    """The samples, and what is left out of them and why."""
    asked, nothing = run.config.evaluation, Suite([], [], 0)
    tasks = tuple(dict.fromkeys(asked.tasks))
    if not tasks:
        return nothing, []
    if not any(name in carried for name in TOKENIZERS):
        return nothing, [f"{', '.join(tasks)}: the weights came without a tokenizer"]
    left_out: list[str] = []
    lengths = tuple(dict.fromkeys(asked.lengths or [run.seq_length]))
    try:
        tokenizer = _tokenizer(carried)
        # a text that ends before the window does is no reason to lose a run
        haystack = read_haystack(Path(asked.haystack) if asked.haystack else None, tokenizer, repeat=True)
        suite = make_suite(Grid(tasks, lengths, tuple(asked.depths), asked.samples), tokenizer, haystack, left_out)
    except (DataError, OSError) as error:
        return nothing, [f"{', '.join(tasks)}: {error}"]
    highest = max((int(sample.tokens.max()) for sample in suite.samples), default=0)
    if highest >= run.model.vocab_size:
        why = f"the tokenizer has an id {highest:,} and the model {run.model.vocab_size:,} rows"
        return nothing, [f"{', '.join(tasks)}: {why}"]
    return suite, left_out


def _tokenizer(carried: Mapping[str, bytes]) -> PromptTokenizer:
    with tempfile.TemporaryDirectory(prefix="megalong-tokenizer-") as folder:
        for name, content in carried.items():
            (Path(folder) / name).write_bytes(content)
        return PromptTokenizer(Path(folder))
