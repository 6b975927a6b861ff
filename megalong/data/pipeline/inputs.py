"""A source consists of shards: one per file; large plain .jsonl in parts, small texts in parcels.

The list is a function of the folder and of nothing else, so that every worker of a cluster makes the same one.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalong.data.pipeline.settings import Settings
from megalong.runtime.errors import DataError

PART = 256 * 2**20
"""Bytes of a plain .jsonl that are one shard."""
PARCEL = 64 * 2**20
"""Bytes of small text files that are one shard."""
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")
TEXTS: tuple[str, ...] = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts")
TEXTS += (".go", ".rs", ".scala", ".rb", ".php", ".cs", ".swift", ".kt", ".lua", ".pl", ".r", ".jl", ".sh", ".sql")
TEXTS += (".tex", ".html")
REFUSED = (
    ".csv",
    ".tsv",
    ".feather",
    ".npy",
    ".npz",
    ".tfrecord",
    ".xz",
    ".bz2",
    ".lz4",
    ".zip",
    ".tar",
    ".tgz",
    ".7z",
)
"""Data that has to be written in another format first; also .gz and .zst of something else than JSON lines."""
UNFINISHED = (".part", ".partial", ".incomplete", ".crdownload", ".aria2", ".tmp")
"""Downloads that did not end."""
ABOUT = ("readme", "license", "licence", "copying", "notice", "changelog", "authors", "citation", "contributing")
"""How the names of text files begin that are about the data; beside other data they are not part of it."""


@dataclass(frozen=True)
class Shard:
    """What one task tokenizes."""

    kind: str
    """lines, parquet, arrow, megatron or texts."""
    source: str
    """Name of the source of documents that do not name their own."""
    root: str
    """Folder that `files` are below."""
    files: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    """Part of a plain .jsonl, bytes."""

    @property
    def name(self) -> str:
        """How people call it."""
        part = "" if self.stop is None else f" bytes {self.start} to {self.stop}"
        more = "" if len(self.files) == 1 else f" and {len(self.files) - 1} more files"
        return f"{self.source}: {self.files[0]}{part}{more}"

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [Path(self.root, name) for name in self.files]

    @property
    def bytes(self) -> int:
        """Size on disk of what is read."""
        if self.stop is not None:
            return self.stop - self.start
        return sum(path.stat().st_size for path in self.paths)


def shards_of(settings: Settings) -> tuple[list[Shard], list[str]]:
    """All shards in their order, and for people what is there and not read.

    Raises:
        DataError: nothing there, data in a format that is not read, downloads that did not end, broken links, or two
            kinds of data where one has to be it.
    """
    named = settings.sources or {"all": settings.source or ""}
    shards: list[Shard] = []
    left_out: list[str] = []
    for name, place in named.items():
        found, left = _below(name, Path(place), tuple(settings.suffixes))
        shards += found
        left_out += left
    return shards, left_out


def _below(name: str, place: Path, more: tuple[str, ...]) -> tuple[list[Shard], list[str]]:
    if place.is_file():
        root, paths = place.parent, [place]
    elif place.is_dir():
        root, paths = place, sorted(files_below(place))
    else:
        raise DataError(f"There is no source {place}.")
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        kinds[_kind(path, place, root, more)].append(path)
    if any(path.name == "state.json" for path in paths):
        kinds = _of_datasets(kinds, root)
    for kind, files in kinds.items():
        if kind.startswith("!"):
            raise DataError(
                f"{place} holds data that is not read: {_listed(kind[1:], files)}. Write it as .jsonl, .jsonl.zst or "
                ".parquet (finish or remove downloads and links), or keep in the folder only what is meant."
            )
    data = {k: kinds.pop(k) for k in ("lines", "parquet", "arrow", "megatron", "texts") if k in kinds}
    if len(data) > 1 and "texts" in data:
        about = [p for p in data["texts"] if p.name.lower().startswith(ABOUT)]
        if len(about) == len(data["texts"]):
            kinds["text about the data"] = data.pop("texts")
    if not data:
        there = "; ".join(_listed(k, kinds[k]) for k in sorted(kinds)) or "nothing"
        raise DataError(
            f"{place} holds nothing that is read as documents: .txt, .md, code, .jsonl (plain, .gz, .zst), .parquet. "
            f"There: {there}."
        )
    if len(data) > 1:
        there = "; ".join(_listed(k, v) for k, v in data.items())
        raise DataError(f"{place} holds {there}. Which is the data? Put each into a folder of its own.")
    ((kind, files),) = data.items()
    if not any(path.stat().st_size for path in files):
        raise DataError(f"{place}: {_count(files)}, and nothing in {'it' if len(files) == 1 else 'them'}.")
    for path in files:
        if not os.access(path, os.R_OK):
            raise DataError(f"{path} cannot be read (permission denied).")
    shards = list(_split(kind, name, root, files))
    return shards, [f"left out of {place}: {_listed(kind, kinds[kind])}" for kind in sorted(kinds)]


def files_below(folder: Path) -> Iterator[Path]:
    """All files, links followed, each folder once. Raises DataError for a folder that cannot be read."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error

    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(name)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(name) / file for file in files)


def _listed(kind: str, paths: list[Path]) -> str:
    """Files of a kind as messages name them: how many, how large, an example."""
    size = sum(p.lstat().st_size for p in paths)
    return f"{_count(paths)} ({kind}), {size:,} bytes, such as {paths[0]}"


def _count(paths: list[Path]) -> str:
    return f"{len(paths):,} file{'' if len(paths) == 1 else 's'}"


def _kind(path: Path, place: Path, root: Path, more: tuple[str, ...]) -> str:
    """What a file is read as, or why it is not; with `!`, why the source is refused."""
    suffix, lower = path.suffix.lower(), path.name.lower()
    if not path.exists():
        return "!broken links"
    if not path.is_file():
        return "what is no file"
    if path != place and any(part.startswith(".") for part in path.relative_to(root).parts):
        return "hidden files"
    if lower.endswith(LINES):
        return "lines"
    if suffix == ".parquet":
        return "parquet"
    if suffix == ".arrow":
        return "arrow"
    if suffix == ".bin" and path.with_suffix(".idx").exists():
        return "megatron"
    if suffix == ".idx" and path.with_suffix(".bin").exists():
        return "indexes of megatron files"
    if suffix in (*TEXTS, *more):
        return "texts"
    if suffix in (*UNFINISHED, *REFUSED, ".gz", ".zst", ".bin", ".idx"):
        return f"!{suffix}"
    return suffix or "files without a suffix"


def _of_datasets(kinds: dict[str, list[Path]], root: Path) -> dict[str, list[Path]]:
    """Of a folder that `save_to_disk` made, the files that its state.json names; no others are part of it."""
    named = set()
    for state in [p for files in kinds.values() for p in files if p.name == "state.json"]:
        try:
            named |= {state.parent / entry["filename"] for entry in json.loads(state.read_text())["_data_files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{state} is not that of a datasets folder ({error}).") from error
    if missing := sorted(path for path in named if not path.is_file()):
        raise DataError(f"{missing[0]} is named in the state.json beside it and is not there.")
    other = [path for path in kinds.get("arrow", []) if path not in named]
    kept = {kind: files for kind, files in kinds.items() if kind != "arrow"}
    if named:
        kept["arrow"] = sorted(named)
    if other:
        kept["arrow files that state.json does not name"] = other
    return kept


def _split(kind: str, name: str, root: Path, files: list[Path]) -> Iterator[Shard]:
    parcel: list[str] = []
    held = 0
    for path in files:
        relative = path.relative_to(root).as_posix()
        size = path.stat().st_size
        if kind == "texts":
            parcel.append(relative)
            held += size
            if held >= PARCEL:
                yield Shard(kind, name, str(root), tuple(parcel))
                parcel, held = [], 0
        elif kind == "lines" and size > PART and path.suffix.lower() in (".jsonl", ".ndjson"):
            for start in range(0, size, PART):
                yield Shard(kind, name, str(root), (relative,), start, min(start + PART, size))
        else:
            yield Shard(kind, name, str(root), (relative,))
    if parcel:
        yield Shard(kind, name, str(root), tuple(parcel))
