"""The samples of an evaluation and what their slots say: a grid of tasks, lengths and depths."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from megalong.evaluation.haystack import Haystack
from megalong.evaluation.sample import Sample, Slot
from megalong.evaluation.tasks import BY_DEPTH, TASKS, Question, check_tasks
from megalong.evaluation.tokens import PromptTokenizer
from megalong.runtime.errors import ConfigError, DataError


@dataclass(frozen=True)
class Grid:
    """What is asked."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of prompt and answer together."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 3
    """Of every cell."""
    seed: int = 0

    def __post_init__(self) -> None:
        if wrong := check_tasks(self.tasks):
            raise ConfigError(f"There is no task {', '.join(wrong)}: choose among {', '.join(TASKS)}.")
        if not self.lengths or min(self.lengths) < 1 or self.samples < 1:
            raise ConfigError(f"lengths {list(self.lengths)} and samples {self.samples}: each must be at least 1.")
        if not self.depths or not all(0 <= d <= 1 for d in self.depths):
            raise ConfigError(f"depths {list(self.depths)}: numbers from 0 (the beginning) to 1 (the end).")


@dataclass(frozen=True)
class Cell:
    """One sample of the grid and where it counts."""

    task: str
    length: int
    depth: float | None
    """None where the task has no depth of its own."""
    first_slot: int
    slots: int


@dataclass(frozen=True)
class Suite:
    """Samples to be scored, all at once."""

    cells: list[Cell]
    samples: list[Sample]
    slots: int


@dataclass(frozen=True)
class CellResult:
    """What came of the samples of one task, length and depth."""

    task: str
    length: int
    depth: float | None
    samples: int
    accuracy: float
    """Mean over samples of the share of answers that greedy decoding would write."""
    exact: float
    """Share of samples in which it would write all of them."""
    loss: float
    """Nats per token of the answers."""


@dataclass
class Drawn:
    """A question as tokens."""

    prompt: list[int]
    answers: list[list[int]] = field(default_factory=list)


class TooShortError(DataError):
    """A length does not hold the question."""


def make_suite(grid: Grid, tokenizer: PromptTokenizer, haystack: Haystack, left_out: list[str] | None = None) -> Suite:
    """Draw all samples of a grid.

    Args:
        left_out: receives what is wrong with lengths that do not hold a question, which are then left out.

    Raises:
        DataError: a haystack that is too short.
        TooShortError: a length that does not hold the question, where none may be left out.
    """
    cells, samples, slot = [], [], 0
    for task in grid.tasks:
        for length in grid.lengths:
            try:
                draw_tokens(task, length, None, random.Random(grid.seed), tokenizer, haystack)
            except TooShortError as error:
                if left_out is None:
                    raise
                left_out.append(f"{task} at {length:,} tokens: {error}")
                continue
            for depth in grid.depths if task in BY_DEPTH else (None,):
                for i in range(grid.samples * (1 if task in BY_DEPTH else len(grid.depths))):
                    # the same for every checkpoint: of the cell's own name alone
                    rng = random.Random(zlib.crc32(f"{grid.seed} {task} {length} {depth} {i}".encode()))
                    drawn = draw_tokens(task, length, depth, rng, tokenizer, haystack)
                    cells.append(Cell(task, length, depth, slot, len(drawn.answers)))
                    samples.append(Sample.of(drawn.prompt, drawn.answers, slot))
                    slot += len(drawn.answers)
    return Suite(cells, samples, slot)


def draw_tokens(
    task: str, length: int, depth: float | None, rng: random.Random, tokenizer: PromptTokenizer, haystack: Haystack
) -> Drawn:
    """One question of exactly `length` tokens, prompt and answers together.

    Raises:
        TooShortError: the length does not hold it.
        DataError: the haystack is too short.
    """
    at = rng.random() if depth is None else depth
    question = TASKS[task](rng, at, length)
    if question.lead:
        before, between = tokenizer.frame()
        lead = question.lead if tokenizer.chat else f"\n{question.lead}"
        tail = tokenizer.encode(question.ask) + between + tokenizer.encode(lead)
    else:
        before, tail = tokenizer.beginning, tokenizer.encode(question.ask)
    head = before + tokenizer.encode(question.head)
    answers = tokenizer.answers(lead if question.lead else question.ask, question.answers)
    inserts = [(d, tokenizer.encode(text)) for d, text in question.inserts]
    fixed = len(head) + len(tail) + sum(map(len, answers))
    needed = fixed + sum(len(piece) for _, piece in inserts)
    if length < needed + 1:
        raise TooShortError(
            f"A {task} question takes {needed} tokens with this tokenizer, before any haystack: length {length} is too "
            f"short. Ask for more than {needed} tokens."
        )
    text = _filler(question, tokenizer, haystack)
    start = rng.randrange(len(text.sentences)) if text.repeats and question.filler is None else 0
    return Drawn(head + text.with_inserts(length - fixed, inserts, start) + tail, answers)


def _filler(question: Question, tokenizer: PromptTokenizer, haystack: Haystack) -> Haystack:
    if question.filler is None:
        return haystack
    return Haystack([tokenizer.encode(" " + s) for s in question.filler], "of the task", True)


def results(suite: Suite, slots: Sequence[Slot]) -> list[CellResult]:
    """Gather scored slots by task, length and depth, in the order of the grid."""
    groups: dict[tuple[str, int, float | None], list[Cell]] = {}
    for cell in suite.cells:
        groups.setdefault((cell.task, cell.length, cell.depth), []).append(cell)
    found = []
    for (task, length, depth), cells in groups.items():
        own = [slots[c.first_slot : c.first_slot + c.slots] for c in cells]
        tokens = sum(s.tokens for some in own for s in some)
        found.append(
            CellResult(
                task,
                length,
                depth,
                len(cells),
                sum(sum(s.exact for s in some) / len(some) for some in own) / len(own),
                sum(all(s.exact for s in some) for some in own) / len(own),
                sum(s.loss for some in own for s in some) / max(1, tokens),
            )
        )
    return found
