"""A shard becomes tokens in one task: its output follows from input and settings alone, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megalong.data.output_folder import output_folder
from megalong.data.pipeline import tokenized
from megalong.data.pipeline.documents import Document, Fields
from megalong.data.pipeline.faults import Fault
from megalong.data.pipeline.inputs import Shard
from megalong.data.pipeline.reading import read_shard
from megalong.data.pipeline.tokenized import COLUMNS, TOKEN, TOKENS, Report
from megalong.data.tokenizer import TextTokenizer, load_tokenizer
from megalong.runtime.errors import DataError

VERSION = 1
BATCH_CHARACTERS = 1_000_000
"""Text that is tokenized at a time."""
SAMPLE = 65536
"""Bytes at either end of a file that its identity is taken from, with its size."""
EXAMPLES = 5


@dataclass(frozen=True)
class Task:
    """Everything that the tokens of a shard depend on, and where they go."""

    shard: Shard
    fields: Fields
    tokenizer: str
    """tokenizer.json or its folder."""
    home: str
    """Folder of all tokenized shards."""

    identity: str
    """Of exactly this input with exactly these settings: the name of the folder."""

    @property
    def folder(self) -> Path:
        """Where the tokens are, or will be."""
        return Path(self.home, self.identity)


def task_of(shard: Shard, fields: Fields, tokenizer: Path, tokenizer_sha256: str, home: Path) -> Task:
    """The task of a shard.

    Raises:
        DataError: a file cannot be read.
    """
    digest = hashlib.sha256()
    said = [VERSION, dataclasses.asdict(shard) | {"root": ""}, dataclasses.asdict(fields), tokenizer_sha256]
    digest.update(json.dumps(said).encode())
    try:
        for path in shard.paths + [p.with_suffix(".idx") for p in shard.paths if p.suffix == ".bin"]:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(str(size).encode() + file.read(SAMPLE))
                file.seek(max(0, size - SAMPLE))
                digest.update(file.read(SAMPLE))
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror}).") from error
    identity = f"{digest.hexdigest()[:20]}-{Path(shard.files[0]).name[:80]}"
    return Task(shard, fields, str(tokenizer), str(home), identity)


def done(task: Task) -> bool:
    """Whether the tokens are there."""
    return (task.folder / tokenized.REPORT).is_file()


def run(task: Task) -> None:
    """Tokenize a shard, unless that was done before.

    Raises:
        DataError: the input cannot be read, the disk is full, or another program is at this task.
    """
    if done(task):
        return
    with output_folder(task.folder) as folder:
        work = _Work(task, load(task.tokenizer))
        with (folder / TOKENS).open("wb") as tokens:
            for ids in work.documents():
                tokens.write(ids.astype(TOKEN, copy=False).data)
        tokenized.write(folder, work.columns(), work.report())


@lru_cache(maxsize=2)
def load(path: str) -> TextTokenizer:
    """The tokenizer, once per process."""
    return load_tokenizer(Path(path))


class _Work:
    """Documents of a shard on their way to tokens, counted."""

    def __init__(self, task: Task, tokenizer: TextTokenizer) -> None:
        self._task, self._tokenizer = task, tokenizer
        self._sources: dict[str, int] = {}
        self._records: list[tuple[int, ...]] = []
        self._tokens = self._characters = self._number = 0
        self._dropped: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._examples: list[str] = []

    def documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, [n] uint32, in order."""
        batch: list[Document] = []
        characters = 0
        for found in read_shard(self._task.shard, self._task.fields, self._tokenizer.info):
            if isinstance(found, Fault):
                self._faults[found.kind] += 1
                self._examples += [f"{found.kind} {found.where}"] if len(self._examples) < EXAMPLES else []
                continue
            batch.append(found)
            characters += len(found.text)
            if characters >= BATCH_CHARACTERS:
                yield from self._encoded(batch)
                batch, characters = [], 0
        yield from self._encoded(batch)

    def _encoded(self, batch: list[Document]) -> Iterator[np.ndarray]:
        texts = [d.text for d in batch if isinstance(d.text, str)]
        encoded = iter(self._tokenizer.ids(texts))
        for document in batch:
            self._number += 1
            if isinstance(document.text, str):
                ids = next(encoded)
                raw = document.text.encode()
                blank = not document.text.strip()
            else:
                ids = document.text
                raw = ids.tobytes()
                blank = not len(ids)
            if blank:
                self._dropped["empty"] += 1
                continue
            self._note(document, raw, len(ids))
            yield ids

    def _note(self, document: Document, raw: bytes, length: int) -> None:
        name = document.source or self._task.shard.source
        source = self._sources.setdefault(name, len(self._sources))
        text_hash = place = text_hash_of(raw)
        if document.join is not None:
            place = text_hash_of(f"{name}\0{document.join}".encode("utf-8", "surrogatepass"))
        self._records.append((place, text_hash, self._tokens, length, self._number - 1, source))
        self._tokens += length
        self._characters += len(document.text)

    def columns(self) -> np.ndarray:
        return np.array(self._records, dtype=np.uint64).reshape(-1, len(COLUMNS)).T

    def report(self) -> Report:
        columns = self.columns()
        by_source = {
            name: tokenized.histogram(columns[3][columns[5] == index]) for name, index in self._sources.items()
        }
        return Report(
            shard=self._task.shard.name,
            bytes=self._task.shard.bytes,
            characters=self._characters,
            documents=len(self._records),
            tokens=self._tokens,
            sources=list(self._sources),
            dropped=dict(sorted(self._dropped.items())),
            faults=dict(sorted(self._faults.items())),
            examples=self._examples,
            histogram=by_source,
        )


def text_hash_of(raw: bytes) -> int:
    """What a text is known by: copies agree in it, and `builder.held_out` decides by it."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")
