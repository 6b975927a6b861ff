"""Which runs made a model, and what did each leave behind? From its run_dir back to the base, stage by stage.

Whatever a run did not write, or what has gone since, becomes a sentence in `missing`; nothing is guessed in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard

from megalong.checkpoint.info import CheckpointInfo, read_info
from megalong.checkpoint.pointer import RUN_CONFIG, resolve
from megalong.config.schema import Config
from megalong.data.manifest import MANIFEST_NAME, Manifest, read_manifest
from megalong.evaluation.results import StageEvaluation, read_evaluation
from megalong.model.llama import read_hf_config
from megalong.recipe.saved import saved_config
from megalong.runtime.errors import CheckpointError, UserError
from megalong.runtime.files import sha256_of
from megalong.runtime.json_file import parse
from megalong.training.records import METRICS

_T = TypeVar("_T")
_LONGEST = 64  # stages of one chain


@dataclass(frozen=True)
class Stage:
    """One run of the chain."""

    run_dir: Path
    config: Config
    info: CheckpointInfo
    checkpoint: str
    """Name of the checkpoint folder that is meant."""
    steps: list[dict[str, Any]]
    """Records of metrics.jsonl, one per step up to the checkpoint's."""
    evaluation: StageEvaluation | None
    manifest: Manifest | None
    manifest_sha256: str | None

    @property
    def name(self) -> str:
        return self.info.stage or self.config.stage.name

    @property
    def ranks(self) -> int | None:
        sizes = self.config.topology
        if None in (sizes.tp, sizes.cp, sizes.pp, sizes.dp):
            return None
        return (sizes.tp or 1) * (sizes.cp or 1) * (sizes.pp or 1) * (sizes.dp or 1)

    @property
    def tokens(self) -> int:
        return self.info.consumed_samples * self.info.seq_length

    @property
    def is_finished(self) -> bool:
        return self.config.train.steps is None or self.info.step >= self.config.train.steps

    @property
    def seconds(self) -> float | None:
        """Of all steps, data loading included, saves and start-up not; None where a step is not recorded."""
        known = [r["seconds"] for r in self.steps if isinstance(r.get("seconds"), int | float)]
        return sum(known) if known and len(known) == self.info.step else None

    @property
    def device_hours(self) -> float | None:
        return None if self.seconds is None or self.ranks is None else self.seconds * self.ranks / 3600


@dataclass(frozen=True)
class Base:
    """What the first stage started from."""

    words: str
    name: str | None = None
    """As its folder is called."""
    front: dict[str, Any] = field(default_factory=dict)
    """What the front of its README.md says."""
    repository: str | None = None
    """Its name on the hub."""


@dataclass(frozen=True)
class Lineage:
    """A model's runs, the first stage first."""

    stages: list[Stage]
    base: Base
    missing: list[str]


def lineage(run_dir: Path) -> Lineage:
    """Read the runs that led to a model.

    Args:
        run_dir: of the last stage.

    Raises:
        CheckpointError: it is no run_dir, or has no whole checkpoint.
    """
    if not (run_dir / RUN_CONFIG).is_file():
        raise CheckpointError(f"{run_dir} is no run_dir: it has no {RUN_CONFIG}. A card is made from what a run wrote.")
    missing: list[str] = []
    stages = [_stage(run_dir, missing)]
    seen = {run_dir.resolve()}
    while len(stages) < _LONGEST:
        given = stages[0].config.init_from
        if given is None:
            return Lineage(stages, Base("random weights"), missing)
        before = Path(given)
        if not (before / RUN_CONFIG).is_file() or before.resolve() in seen:
            return Lineage(stages, _base(before, missing), missing)
        seen.add(before.resolve())
        try:
            stages.insert(0, _stage(before, missing))
        except UserError as error:
            missing.append(f"The run before {stages[0].name}: {error}")
            return Lineage(stages, Base(f"`{given}`, which cannot be read any more"), missing)
    raise CheckpointError(f"{run_dir}: more than {_LONGEST} runs lead to it.")


def _stage(path: Path, missing: list[str]) -> Stage:
    """A run, or one checkpoint of it."""
    folder = resolve(path)
    run_dir = folder.parent.parent if folder.parent.name == "checkpoints" else path
    info, config = read_info(folder), saved_config(folder)
    name = info.stage or config.stage.name

    def tried(read: Callable[[], _T], what: str) -> _T | None:
        try:
            return read()
        except (UserError, OSError, ValueError) as error:
            missing.append(f"{what} of {name}: {error}")
            return None

    steps = tried(lambda: _records(run_dir / METRICS, info.step), "Measured steps") or []
    if steps and len(steps) != info.step:
        missing.append(f"Wall time of {name}: {METRICS} has {len(steps)} of {info.step} steps.")
    evaluation = tried(lambda: read_evaluation(run_dir), "Loss by position")
    data = Path(config.data.path) if config.data.path else None
    if data is None:
        missing.append(f"Data of {name}: its configuration names no folder.")
    manifest = tried(lambda: read_manifest(data), "Data") if data else None
    digest = tried(lambda: sha256_of(data / MANIFEST_NAME), "Data") if data and manifest else None
    return Stage(run_dir, config, info, folder.name, steps, evaluation, manifest, digest)


def _records(path: Path, last: int) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            record = parse(line, allow_nan=True)
        except ValueError:
            continue  # cut short by a kill; the step is then counted as not recorded
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is int and 0 < step <= last:
            found[step] = record
    return [found[step] for step in sorted(found)]


def _base(path: Path, missing: list[str]) -> Base:
    if not path.is_dir():
        missing.append(f"The base: `{path}` is not there any more, so its licence and repository are not known.")
        return Base(f"`{path}`", path.name)
    front: dict[str, Any] = {}
    readme = path / "README.md"
    if not readme.is_file():
        missing.append(f"Licence of the base: `{path.name}` has no README.md.")
    else:
        try:
            front = ModelCard(readme.read_text("utf-8"), ignore_metadata_errors=True).data.to_dict()
        except Exception as error:  # the front matter is anything that YAML can say
            missing.append(f"Licence of the base: {readme} is not understood: {error}")
    repository = _repository(path)
    if repository is None:
        missing.append(f"Repository of the base: the config.json of `{path.name}` does not name it (_name_or_path).")
    return Base(f"`{path.name}`", path.name, front, repository)


def _repository(path: Path) -> str | None:
    """Where on the hub a folder is from: what its config.json says, if it is that folder's name."""
    try:
        said = read_hf_config(path).get("_name_or_path")
    except UserError:
        return None
    found = isinstance(said, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", said) and said.split("/")[1] == path.name
    return str(said) if found else None
