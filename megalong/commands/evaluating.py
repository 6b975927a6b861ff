"""What `megalong-evaluate` does: score checkpoints and set them side by side, or let one of them write.

`given` has the options of megalong/commands/evaluate.py under their names.
"""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from megalong.runtime import console, launch
from megalong.runtime.errors import ConfigError

if TYPE_CHECKING:
    from megalong.evaluation.checkpoint import Checkpoint
    from megalong.evaluation.tokens import PromptTokenizer


def evaluate(process: launch.Process, given: SimpleNamespace) -> int:
    """Score checkpoints side by side, and write what was found."""
    from megalong.evaluation.checkpoint import find_checkpoint, layout_for
    from megalong.evaluation.evaluate import Evaluation, Material, evaluate_model, material_samples
    from megalong.evaluation.haystack import read_haystack
    from megalong.evaluation.score import scored_tokens
    from megalong.evaluation.suite import Grid, make_suite

    layout = layout_for(process.world_size, given.tp, given.cp, given.pp)
    found = [find_checkpoint(path) for path in given.checkpoints]
    base = find_checkpoint(given.base) if given.base else None
    tokenizer = _tokenizer(given, found[0])
    window = max(c.model.max_position_embeddings for c in found)
    lengths = (
        _numbers("--lengths", given.lengths, int) if given.lengths else sorted({max(1, window >> i) for i in range(4)})
    )
    tasks = () if given.tasks == "none" else tuple(given.tasks.split(","))
    grid = Grid(tasks, tuple(lengths), tuple(_numbers("--depths", given.depths, float)), given.samples, given.seed)
    for checkpoint in found:
        _beyond(checkpoint, max(lengths))
    left_out: list[str] | None = None if given.lengths else []
    suite = make_suite(grid, tokenizer, read_haystack(given.haystack, tokenizer, given.repeat), left_out)
    if left_out:
        console.say(f"left out, because the length does not hold it: {'; '.join(x.split(':')[0] for x in left_out)}")
    if tokenizer.crossed:
        console.warn(
            f"{tokenizer.crossed} of {len(suite.samples)} answers would be tokenized otherwise together with their "
            "prompt; they are scored as tokenized apart (docs/evaluation.md)."
        )
    material = _documents(given, suite, tokenizer, window, base)
    launch.init_process_group(process, 1800.0)
    evaluations: list[Evaluation] = []
    keys: list[int] | None = None
    asked_of: list[tuple[str, Checkpoint, Material]] = [
        (str(path), c, material) for path, c in zip(given.checkpoints, found, strict=True)
    ]
    if base is not None and material.short:
        empty = make_suite(Grid((), (1,)), tokenizer, read_haystack(None, tokenizer))
        asked_of.append((str(given.base), base, Material(empty, short=material.short)))
    bar = _Progress(sum(scored_tokens(material_samples(m), layout.tp, layout.cp) for _, _, m in asked_of))
    for name, checkpoint, asked in asked_of:
        with _open(given, checkpoint, layout) as (run, model):
            evaluation, keys = evaluate_model(run, model, asked, name, keys, bar.add)
        evaluations.append(evaluation)
    beside = evaluations.pop() if len(asked_of) > len(found) else None
    if process.is_first:
        _write(given, evaluations, beside, grid)
    return 0


def _documents(given: SimpleNamespace, suite: Any, tokenizer: PromptTokenizer, window: int, base: Any) -> Any:
    from megalong.evaluation.documents import long_documents
    from megalong.evaluation.evaluate import Material

    if given.documents is None:
        if given.base is not None:
            raise ConfigError("--base needs --documents: the short documents whose loss is compared.")
        return Material(suite)
    length = given.window or window
    short = given.base_window or (base.model.max_position_embeddings if base else 0)
    documents = long_documents(given.documents, tokenizer, length + 1, given.count)
    pieces = long_documents(given.documents, tokenizer, short + 1, given.count) if short else []
    return Material(suite, documents, pieces, short if 2 * short < length else 0)


def _write(given: SimpleNamespace, evaluations: Any, base: Any, grid: Any) -> None:
    from megalong.evaluation.heatmap import draw, table
    from megalong.evaluation.tasks import BY_DEPTH
    from megalong.runtime.files import write_text
    from megalong.training.records import EventFile

    console.say(table(evaluations, base))
    given.out.mkdir(parents=True, exist_ok=True)
    record = {"checkpoints": [e.as_json() for e in evaluations], "base": base.as_json() if base else None}
    write_text(given.out / "evaluation.json", json.dumps(record, indent=1) + "\n")
    board = EventFile(given.out / "tensorboard", purge_step=0)
    for task in grid.tasks:
        if task in BY_DEPTH and any(c.task == task for c in evaluations[0].cells):
            picture = draw(evaluations, task)
            (given.out / f"{task}.png").write_bytes(picture)
            board.add_png(f"evaluation/{task}", picture, 0)
    board.close()
    console.say(f"{given.out}: evaluation.json, heat maps, tensorboard")


def sample(process: launch.Process, given: SimpleNamespace) -> int:
    """Print what a model writes behind a needle."""
    from megalong.evaluation.checkpoint import find_checkpoint, layout_for
    from megalong.evaluation.haystack import read_haystack
    from megalong.evaluation.sample import Sample
    from megalong.evaluation.score import score
    from megalong.evaluation.suite import Grid, draw_tokens

    layout = layout_for(process.world_size, given.tp, given.cp, given.pp)
    checkpoint = find_checkpoint(given.checkpoint)
    tokenizer = _tokenizer(given, checkpoint)
    length = given.length or checkpoint.model.max_position_embeddings // 2
    Grid((given.task,), (length,), (given.depth,), 1)  # checks them
    _beyond(checkpoint, length + given.tokens)
    haystack = read_haystack(given.haystack, tokenizer, given.repeat)
    drawn = draw_tokens(given.task, length, given.depth, random.Random(given.seed), tokenizer, haystack)
    launch.init_process_group(process, 1800.0)
    written: list[int] = []
    with _open(given, checkpoint, layout) as (run, model):
        ends = checkpoint.model.eos_token_id
        stop = set(ends if isinstance(ends, list) else [ends])
        while len(written) < given.tokens and not stop & set(written[-1:]):
            asked = Sample.of([*drawn.prompt, *written], [[0]], 0)  # the token 0 stands where the next one is asked
            written.append(score(run, model, [asked], 1)[0].last)
    console.say(f"prompt: {len(drawn.prompt):,} tokens, {given.task} at depth {given.depth:g}; its end:")
    console.say(tokenizer.decode(drawn.prompt[-60:]))
    console.say(f"true:  {tokenizer.decode([i for a in drawn.answers for i in a])}")
    console.say(f"model: {tokenizer.decode(written)}")
    return 0


def _tokenizer(given: SimpleNamespace, checkpoint: Checkpoint) -> PromptTokenizer:
    from megalong.evaluation.tokens import PromptTokenizer

    return PromptTokenizer(given.tokenizer or checkpoint.tokenizer, given.chat)


def _beyond(checkpoint: Checkpoint, tokens: int) -> None:
    window = checkpoint.model.max_position_embeddings
    if tokens > window:
        console.warn(
            f"{checkpoint.folder} has a window of {window:,} tokens and theta {checkpoint.model.rope_theta:,.0f}; it "
            f"is asked about {tokens:,}, which that theta was not made for."
        )


def _open(given: SimpleNamespace, checkpoint: Checkpoint, layout: Any) -> Any:
    from contextlib import contextmanager

    from megalong.evaluation.checkpoint import evaluation_run, opened

    @contextmanager
    def both() -> Any:
        run = evaluation_run(
            checkpoint.model, layout, cp_comm_type=given.cp_comm_type.value, precision=given.precision.value
        )
        with opened(checkpoint, run) as model:
            yield run, model

    return both()


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name} {text}: give numbers with commas between them.") from error


class _Progress:
    """Tokens scored of all, and when it will be done; a line every ten seconds at most."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.begun, self.said = total, 0, time.monotonic(), time.monotonic()

    def add(self, tokens: int) -> None:
        self.done += tokens
        now = time.monotonic()
        if now - self.said > 10 or self.done >= self.total:
            self.said, spent = now, now - self.begun
            left = spent / self.done * max(0, self.total - self.done)
            console.say(f"scored {self.done:,} of {self.total:,} tokens, {spent:.0f} s, ETA {left:.0f} s")
