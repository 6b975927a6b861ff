"""One stage's data is made by a list of tasks, which is the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megalong.data.pipeline import mapping
from megalong.data.pipeline.documents import Fields
from megalong.data.pipeline.inputs import shards_of
from megalong.data.pipeline.mapping import Task, task_of
from megalong.data.pipeline.pool import run_all
from megalong.data.pipeline.quotas import apportion, groups_of, require_enough, with_tokens
from megalong.data.pipeline.sampling import Sample, look
from megalong.data.pipeline.settings import ANY, Settings, check
from megalong.data.tokenizer import TextTokenizer, load_tokenizer
from megalong.runtime import console
from megalong.runtime.errors import ConfigError, DataError

SURELY = 2
"""A sample that finds this many times too little is believed."""


@dataclass(frozen=True)
class Job:
    """One data folder to make."""

    settings: Settings
    tokenizer: Path
    """Hugging Face directory with tokenizer.json, or that file."""
    stage: str
    seq_length: int
    """Window, tokens."""
    sequences: int
    """What the stage trains on: steps times sequences per step."""
    seed: int
    workers: int = 1
    batch: int = 1
    """Sequences of a step."""

    @property
    def wanted(self) -> int | None:
        """Sequences to lay out; None: all there are."""
        return None if self.settings.budget == "all" else self.settings.sequences or self.sequences

    @property
    def steps(self) -> dict[int | None, int]:
        """Window (None: the stage's) -> steps that read it; where there is one, of a round of one."""
        if len(self.windows) == 1:
            return {None: 1}
        shares: dict[int | None, float] = {None: 0.0}
        for band in self.settings.mix:
            shares[band.window] = shares.get(band.window, 0.0) + band.share
        return dict(zip(shares, apportion((self.wanted or 0) // self.batch, list(shares.values())), strict=True))

    @property
    def totals(self) -> dict[int | None, int]:
        """Window (None: the stage's) -> tokens to lay out."""
        assert self.wanted is not None
        if len(self.windows) == 1:
            return {None: self.wanted * self.seq_length}
        return {window: steps * self.batch * self.seq_length for window, steps in self.steps.items()}

    @property
    def windows(self) -> list[int | None]:
        """The stage's (None) and those of the mix."""
        return [None, *sorted({b.window for b in self.settings.mix if b.window is not None}, reverse=True)]

    @property
    def size(self) -> int:
        """Bytes of the data folder, if they are known before the work: what is held out comes on top."""
        return 4 * sum(self.totals.values()) if self.wanted is not None else 0

    @property
    def out(self) -> Path:
        """The data folder."""
        assert self.settings.out is not None
        return Path(self.settings.out)

    @property
    def fields(self) -> Fields:
        """Where the parts of a document stand."""
        s = self.settings
        return Fields(s.text_key, s.source_key, s.join_key, s.max_document_bytes)


def checked(job: Job) -> TextTokenizer:
    """The tokenizer, once the settings make sense.

    Raises:
        ConfigError: they contradict each other.
        DataError: no such tokenizer.
    """
    check(job.settings)
    _check_windows(job)
    mix = job.settings.mix
    if job.settings.recall.share and mix and all(band.whole_windows for band in mix):
        raise ConfigError("data.recall needs a part of the mix that is not whole_windows: facts are put into its text.")
    return load_tokenizer(job.tokenizer)


def _check_windows(job: Job) -> None:
    for i, band in enumerate(job.settings.mix):
        if band.window is not None and (band.window >= job.seq_length or job.seq_length % band.window):
            raise ConfigError(
                f"data.mix[{i}].window={band.window}: sequences of it do not fill the stage's window of "
                f"{job.seq_length:,} tokens; give a divisor of it (+scale divides both)."
            )
    if len(job.windows) == 1:
        return
    assert job.wanted is not None  # a mix excludes budget=all
    if job.wanted % job.batch:
        raise ConfigError(
            f"data.sequences={job.wanted}: steps are of {job.batch} sequences, and whole steps alternate between "
            "windows. Give a multiple."
        )
    if none := [window or job.seq_length for window, steps in job.steps.items() if not steps]:
        raise ConfigError(
            f"data.mix: of {job.wanted // job.batch} steps the share of window {none[0]:,} is none. Every window needs "
            "a step: give it a larger share, and the stage's own window one."
        )


def tasks_of(job: Job, tokenizer: TextTokenizer, quiet: bool = False) -> list[Task]:
    """The tasks of tokenizing, in the order of the source.

    Raises:
        DataError: what is wrong with the source.
    """
    shards, left_out = shards_of(job.settings)
    for line in () if quiet else left_out:
        console.warn(line)
    home = Path(job.settings.tokenized) if job.settings.tokenized else job.out.absolute().parent / "tokenized"
    return [task_of(shard, job.fields, job.tokenizer, tokenizer.info.sha256, home) for shard in shards]


def refuse_too_little(job: Job, tasks: list[Task], tokenizer: TextTokenizer) -> None:
    """Stop before hours of work if a sample says that the source cannot be read, or is too small for the stage.

    Raises:
        DataError: what is wrong; what is missing, by source.
    """
    sample = look([task.shard for task in tasks], job.fields, tokenizer)
    if sample is None or job.wanted is None or not job.settings.estimate:
        return
    totals = job.totals
    totals[None] = int(totals[None] * (1 - job.settings.recall.share))
    total = sum(totals.values())
    parts = groups_of(job.settings, sorted(sample.lengths)) if sample.complete else []
    if sample.complete:
        available = {
            group: _seen(sample, group.source, group.min_tokens, group.max_tokens) for p in parts for group in p
        }
        wanted = with_tokens(job.settings, parts, available, totals, job.seq_length)
        require_enough([g for g in wanted if not g.whole_windows], available, job.settings.max_passes, estimated=True)
    have = sum(sample.tokens(source) for source in sample.lengths) * job.settings.max_passes
    if have * SURELY < total:
        by_source = ", ".join(f"{source} {sample.tokens(source):,}" for source in sorted(sample.lengths))
        raise DataError(
            f"Too little data for the stage: it wants {total:,} tokens, and by a sample there are about {have:,} "
            f"({by_source}); about {total - have:,} are missing. Give more text, take fewer sequences "
            "(data.sequences), let documents be used more than once (data.max_passes), or tokenize all the same with "
            "data.estimate=false."
        )


def _seen(sample: Sample, source: str, least: int, below: int | None) -> int:
    lengths = [n for name, n in sample.lengths.items() if source in (ANY, name)]
    return int(sum(n[(n >= least) & (n < (below or 2**62))].sum() + len(n) * 2 for n in lengths))


def tokenize(job: Job, tasks: list[Task], progress: bool = True) -> None:
    """Do the tasks that are not done, on all of the job's workers.

    Raises:
        DataError: what a task met.
    """
    todo = [task for task in tasks if not mapping.done(task)]
    with tqdm(
        total=sum(task.shard.bytes for task in todo), unit="B", unit_scale=True, desc="tokenizing", disable=not progress
    ) as bar:
        run_all(mapping.run, todo, job.workers, lambda task: bar.update(task.shard.bytes), lambda t: t.shard.name)


def part_of(tasks: list[Task], number: int, of: int) -> list[Task]:
    """The tasks of one of `of` machines."""
    if not 0 <= number < of:
        raise ConfigError(f"--task={number} --of={of}: tasks are numbered from 0 to {of - 1}.")
    return tasks[number::of]
