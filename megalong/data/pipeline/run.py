"""A source becomes the data folder of a stage: sampled, tokenized shard by shard, chosen, laid out.

Each step is a function of what it is given, so that a run that is broken off and begun again ends with the same bytes,
however many processes or machines tokenize.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalong.data.manifest import MANIFEST_NAME, SPLITS, UINT32, Manifest, OtherWindow, SequenceFile
from megalong.data.output_folder import output_folder, refuse_existing
from megalong.data.pipeline import recall
from megalong.data.pipeline.choosing import Chooser, Chosen, Glue, laid
from megalong.data.pipeline.faults import require_few
from megalong.data.pipeline.index import Index
from megalong.data.pipeline.job import Job, checked, refuse_too_little, tasks_of, tokenize
from megalong.data.pipeline.laying_out import FileTask, file_tasks, write_file
from megalong.data.pipeline.mapping import Task, done
from megalong.data.pipeline.pieces import Constants, Stream
from megalong.data.pipeline.pool import run_all
from megalong.data.pipeline.quotas import Group, groups_of, require_enough, with_tokens
from megalong.data.pipeline.summary import made
from megalong.data.pipeline.tokenized import Tokenized
from megalong.data.tokenizer import TextTokenizer, begin_of_text
from megalong.data.writer import FILE_ELEMENTS
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of


def prepare_stage(job: Job, *, progress: bool = True, file_elements: int = FILE_ELEMENTS) -> Manifest:
    """Make the data folder of a job; what is tokenized already is used.

    Args:
        file_elements: tokens of a file at most (at least one sequence is written to each).

    Raises:
        ConfigError: the settings contradict each other.
        DataError: what is wrong with source, tokenizer or target; too many faults; too little data, by source.
    """
    tokenizer = checked(job)
    refuse_existing(job.out, job.size)
    tasks = tasks_of(job, tokenizer)
    if not all(map(done, tasks)):
        refuse_too_little(job, tasks, tokenizer)
        tokenize(job, tasks, progress)
    return lay_out(job, tokenizer, tasks, file_elements)


def lay_out(job: Job, tokenizer: TextTokenizer, tasks: list[Task], file_elements: int = FILE_ELEMENTS) -> Manifest:
    """From tokenized shards to the data folder.

    Raises:
        DataError: see `prepare_stage`.
    """
    settings = job.settings
    shards = [Tokenized(task.folder) for task in tasks]
    faults: Counter[str] = Counter()
    for shard in shards:
        faults.update(shard.report.faults)
    documents = sum(shard.report.documents for shard in shards)
    examples = [e for shard in shards for e in shard.report.examples]
    require_few(faults, documents, examples, settings.max_fault_share, settings.max_cut_files)
    index = Index(shards, eval_fraction=settings.eval_fraction, min_tokens=settings.min_tokens, dedup=settings.dedup)
    constants = Constants()
    glue = _glue(job, tokenizer)
    chooser = Chooser(index, glue, constants, job.seed, settings.order == "given", job.seq_length)
    chosen, trained = _train(job, tokenizer, index, chooser, constants, glue)
    held_out = chooser.choose_held_out(settings.eval_sequences * job.seq_length)
    streams: dict[int | None, dict[str, Stream]] = {}
    for window in job.windows:
        for_evaluation = Stream(laid([held_out], index.sources), window or job.seq_length)
        streams[window] = {"train": trained[window], "eval": for_evaluation}
    for split, found in streams[None].items():
        if not found.rows:
            raise DataError(
                f"The documents give no {split} sequence at all. Give more of them, or another share of them to hold "
                "out (data.eval_fraction)."
            )
    with output_folder(job.out) as folder:
        places = {window: folder if window is None else folder / f"window-{window}" for window in job.windows}
        written = _written(job, tokenizer, places, streams, [task.folder for task in tasks], constants, file_elements)
        steps = _smallest(job.steps)
        others: list[OtherWindow] = []
        manifest = None
        for window in reversed(job.windows):  # the stage's last: it names the others
            of_window = [c for c in chosen if c.group.window == window]
            manifest = Manifest(
                seq_length=window or job.seq_length,
                tokenizer=tokenizer.info,
                source=settings.source or ", ".join(f"{name}={place}" for name, place in settings.sources.items()),
                train=written[window]["train"],
                eval=written[window]["eval"],
                dtype=UINT32,
                made=made(job, shards, index, of_window, held_out, streams[window], faults, examples),
                steps=steps[window] if window is None else 1,
                others=() if window is not None else tuple(others),
            )
            manifest.write(places[window])
            if window is not None:
                sha256 = sha256_of(places[window] / MANIFEST_NAME)
                others.insert(0, OtherWindow(places[window].name, window, steps[window], sha256))
    assert manifest is not None
    return manifest


def _smallest(steps: dict[int | None, int]) -> dict[int | None, int]:
    """Steps of the shortest round with these shares; its order is the same."""
    divisor = math.gcd(*steps.values())
    return {window: count // divisor for window, count in steps.items()}


def _written(
    job: Job,
    tokenizer: TextTokenizer,
    places: dict[int | None, Path],
    streams: dict[int | None, dict[str, Stream]],
    folders: list[Path],
    constants: Constants,
    file_elements: int,
) -> dict[int | None, dict[str, tuple[SequenceFile, ...]]]:
    """The files of all windows and splits, written by all workers."""
    tasks: list[FileTask] = []
    whose: list[tuple[int | None, str]] = []
    for window, place in places.items():
        place.mkdir(exist_ok=True)
        for split, stream in streams[window].items():
            pad = tokenizer.info.eos_token_id
            found = file_tasks(stream, place, split, folders, constants.ids, pad, file_elements)
            tasks += found
            whose += [(window, split)] * len(found)
    files = list(zip(whose, run_all(write_file, tasks, job.workers), strict=True))
    return {
        window: {split: tuple(file for who, file in files if who == (window, split)) for split in SPLITS}
        for window in places
    }


def _train(
    job: Job, tokenizer: TextTokenizer, index: Index, chooser: Chooser, constants: Constants, glue: Glue
) -> tuple[list[Chosen], dict[int | None, Stream]]:
    """What was chosen, and the stream of each window."""
    settings = job.settings
    parts = groups_of(settings, index.sources)
    available = chooser.available([group for part in parts for group in part])
    if job.wanted is None:
        groups = [Group(g.source, tokens=available[g]) for part in parts for g in part]
        chosen = chooser.choose(groups, 1)
        return chosen, {None: Stream(laid(chosen, index.sources), job.seq_length)}

    def encode(text: str) -> tuple[int, ...]:
        return tuple(next(iter(tokenizer.ids([text]))).tolist())

    totals = job.totals
    rows = totals[None] // job.seq_length
    asked = round(settings.recall.share * rows)
    facts = [recall.Facts(encode, job.seed, i, settings.recall.facts, glue.after) for i in range(asked)]
    totals[None] -= sum(f.tokens for f in facts)
    groups = with_tokens(settings, parts, available, totals, job.seq_length)
    require_enough(groups, available, settings.max_passes)
    chosen = chooser.choose(groups, settings.max_passes)
    pieces = laid([c for c in chosen if c.group.window is None], index.sources)
    if facts:
        whole = sum(g.tokens for g in groups if g.whole_windows and g.window is None) // job.seq_length
        pieces = recall.woven_into(
            pieces,
            facts,
            whole,
            rows,
            job.seq_length,
            settings.recall.early,
            constants,
            len(index.sources),
            _line_ends(tokenizer, index.shards),
        )
    streams: dict[int | None, Stream] = {None: Stream(pieces, job.seq_length)}
    for window in job.windows[1:]:
        mine = [c for c in chosen if c.group.window == window]
        streams[window] = Stream(laid(mine, index.sources), window or job.seq_length)
    assert {w: s.tokens for w, s in streams.items()} == job.totals, (job.totals, streams)
    return chosen, streams


def _glue(job: Job, tokenizer: TextTokenizer) -> Glue:
    eos, settings = tokenizer.info.eos_token_id, job.settings
    before = (begin_of_text(job.tokenizer),) if settings.separator == "eos_bos" else ()
    after = () if settings.separator == "none" else (eos,)
    join = tuple(next(iter(tokenizer.ids([settings.join_text]))).tolist()) if settings.join_text else ()
    return Glue(before, after, join)


def _line_ends(tokenizer: TextTokenizer, shards: list[Tokenized]) -> Callable[[int, int, int], np.ndarray]:
    """(shard, first, last) -> which of these tokens end a line."""
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    ends = np.zeros(tokenizer.info.vocab_size, bool)
    ends[[i for token, i in vocabulary.items() if token.endswith(("\u010a", "\n", "<0x0A>"))]] = True
    return lambda shard, first, last: ends[shards[shard].tokens()[first:last]]
