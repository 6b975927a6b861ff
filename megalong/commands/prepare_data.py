"""From text to the sequences of one stage, or of any window: settings for a stage, options for a folder of text."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf

from megalong.commands.options import FirstIsMeant, outcome
from megalong.data.manifest import read_manifest
from megalong.data.output_folder import refuse_existing
from megalong.data.pipeline import job as jobs
from megalong.data.pipeline.mapping import done
from megalong.data.pipeline.run import prepare_stage
from megalong.data.prepare import prepare
from megalong.recipe.command_line import answer, flags, parse
from megalong.recipe.preparation import is_of_data, job_of
from megalong.runtime.errors import ConfigError

Words = Annotated[list[str], typer.Argument(help="Settings: +stage=65k, data=RECIPE, data.source=..., data.out=...")]
Workers = Annotated[int | None, typer.Option(help="Processes; all cores if it is left out.", min=1)]
PICTURE = "lengths.png"


def simple(
    source: Annotated[
        Path,
        typer.Argument(help="Text files, .jsonl (plain, .gz, .zst) or parquet with a 'text' field: file or folder."),
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

    Every document is taken; one that cannot be read ends it (+stage=... counts some faults instead). A folder with data
    in formats that are not read is refused. Other files, and a README or LICENSE beside .jsonl, are left out and listed
    on stderr.

    Example: python tools/prepare_data.py slimpajama/ data/65k --tokenizer Meta-Llama-3-8B --seq-length 65536
    """
    manifest = prepare(source, out, tokenizer, seq_length, eval_fraction=eval_fraction, min_tokens=min_tokens)
    train, held_out = manifest.sequences("train"), manifest.sequences("eval")
    print(f"{out}: {train:,} sequences of {seq_length:,} tokens to train on, {held_out:,} held out.")


def recipe(words: Words, workers: Workers = None) -> None:
    """Make the data folder of a stage: sample, tokenize, choose, lay out. What is tokenized already is used.

    Settings may have Hydra's flags beside them: --cfg, --info, --config-dir (recipes of your own in DIR/prepare/data).

    Example: python tools/prepare_data.py +stage=1048k data=upsampled data.source=slimpajama/ init_from=MODEL
    """
    if _answered(words):
        return
    job = job_of(words, workers)
    manifest = prepare_stage(job, progress=sys.stderr.isatty())
    train, held_out = manifest.sequences("train"), manifest.sequences("eval")
    print(f"{job.out}: {train:,} sequences of {job.seq_length:,} tokens to train on, {held_out:,} held out.")
    for other in manifest.others:
        found = read_manifest(job.out / other.folder)
        print(
            f"{job.out / other.folder}: {found.sequences('train'):,} sequences of {other.seq_length:,} tokens, "
            f"{found.sequences('eval'):,} held out; of {manifest.steps + other.steps} steps {other.steps}"
        )
    from megalong.evaluation.lengths_picture import draw_lengths  # torch and matplotlib: not in every task of a cluster

    assert manifest.made is not None
    picture = draw_lengths(manifest.made["lengths"], job.out.with_name(f"{job.out.name}-{PICTURE}"))
    print(f"Lengths of documents before and after: {picture}")


def plan(words: Words, workers: Workers = None) -> None:
    """Say as JSON what there is to do, without doing it; what a sample refuses is refused here.

    Example: python tools/prepare_data.py plan +stage=65k data=slimpajama data.source=slimpajama/ init_from=MODEL
    """
    if _answered(words):
        return
    job = job_of(words, workers)
    tokenizer = jobs.checked(job)
    refuse_existing(job.out, job.size)
    tasks = jobs.tasks_of(job, tokenizer)
    if not all(map(done, tasks)):
        jobs.refuse_too_little(job, tasks, tokenizer)
    said = {
        "stage": job.stage,
        "seq_length": job.seq_length,
        "sequences": job.wanted,
        "steps_by_window": {window or job.seq_length: steps for window, steps in job.steps.items()}
        if len(job.windows) > 1
        else None,
        "tasks": len(tasks),
        "done": sum(map(done, tasks)),
        "bytes": sum(task.shard.bytes for task in tasks),
        "tokenized": tasks[0].home,
        "out": str(job.out),
        "settings": dataclasses.asdict(job.settings),
    }
    print(json.dumps(said))


def map_part(
    words: Words,
    task: Annotated[int, typer.Option(help="Number of this machine, from 0.")],
    of: Annotated[int, typer.Option(help="How many machines there are.")],
    workers: Workers = None,
) -> None:
    """Tokenize every N-th shard. Any machine may do any part, at any time, again: what is done is skipped.

    Example: python tools/prepare_data.py map --task 0 --of 8 +stage=65k data.source=slimpajama/ init_from=MODEL
    """
    if _answered(words):
        return
    job = job_of(words, workers)
    tokenizer = jobs.checked(job)
    tasks = jobs.tasks_of(job, tokenizer, quiet=task > 0)
    part = jobs.part_of(tasks, task, of)
    jobs.tokenize(job, part, progress=False)
    print(f"task {task} of {of}: {len(part):,} of {len(tasks):,} shards are tokenized")


def check(
    folder: Annotated[Path, typer.Argument(help="Data folder.")],
    tokenizer: Annotated[Path | None, typer.Option(help="What it was made with, to show text.")] = None,
) -> None:
    """Verify checksums, token ids, boundaries and counts, and show text around a boundary.

    Example: python tools/prepare_data.py check data/1048k --tokenizer Meta-Llama-3-8B
    """
    from megalong.data.pipeline.checking import check_folder  # torch: no other command needs it

    for line in check_folder(folder, tokenizer):
        print(line)


def _answered(words: list[str]) -> bool:
    """Whether a flag of Hydra's asked for something else, which is done then."""
    line = parse(words)
    if line.flags.multirun:
        raise ConfigError("a sweep makes several folders: call prepare_data once for each, with a data.out of its own.")

    def job() -> str:
        found = job_of([*line.added, *line.words])
        sizes = {"stage": found.stage, "seq_length": found.seq_length, "sequences": found.wanted, "seed": found.seed}
        shown = {**sizes, "tokenizer": str(found.tokenizer), "data": dataclasses.asdict(found.settings)}
        return OmegaConf.to_yaml(OmegaConf.create(shown))

    return answer(line, "", job, foreign=is_of_data) is not None


class _Group(FirstIsMeant):
    """Settings mean a stage, anything else plain text."""

    def meant(self, words: list[str]) -> str:
        return "stage" if any(map(_is_of_a_stage, words)) else super().meant(words)


def _is_of_a_stage(word: str) -> bool:
    """Whether a word is a setting or a flag of Hydra's, and not a path."""
    key, equals, _ = word.partition("=")
    if word.startswith("-"):
        return key in flags()
    setting = key.partition(".")[0] in ("stage", "scale", "data") and equals and not Path(word).exists()
    return word.startswith("+") or bool(setting)


app = typer.Typer(
    cls=_Group,
    help=(
        "From text to the sequences of one stage, or of any window.\n\n"
        "Example: python tools/prepare_data.py +stage=1048k data=upsampled data.source=slimpajama/ init_from=MODEL\n\n"
        "Example: python tools/prepare_data.py SOURCE OUT --tokenizer DIR --seq-length 65536\n\n"
        "Words with = are settings, of the trainer and of the data (data.*); with them go Hydra's flags (--cfg, "
        "--info, --config-dir). The commands text and stage need not be named."
    ),
)
# words of settings hold flags of Hydra's, which are none of typer's
_SETTINGS = {"ignore_unknown_options": True}
app.command("text")(simple)
app.command("stage", context_settings=_SETTINGS)(recipe)
app.command("plan", context_settings=_SETTINGS)(plan)
app.command("map", context_settings=_SETTINGS)(map_part)
app.command("check")(check)


def command() -> int:
    """`megalong-prepare-data`; exit code."""
    return outcome(app, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
