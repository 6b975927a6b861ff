"""A plan becomes files of a data folder one by one, so that many processes write one folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalong.data.manifest import UINT32, SequenceFile
from megalong.data.packing import Sequence
from megalong.data.pipeline.pieces import CONSTANT, Stream
from megalong.data.pipeline.tokenized import Tokenized
from megalong.data.writer import FILE_ELEMENTS, SplitWriter


@dataclass(frozen=True)
class FileTask:
    """One file to write."""

    folder: Path
    split: str
    number: int
    rows: int
    seq_length: int
    pieces: np.ndarray
    skip: int
    """Tokens of the first piece that belong to rows before."""
    shards: dict[int, Path]
    constants: list[int]
    pad: int


def file_tasks(
    stream: Stream, folder: Path, split: str, shards: list[Path], constants: list[int], pad: int, elements: int
) -> list[FileTask]:
    """The files of a split.

    Args:
        elements: tokens of a file at most; at least one row is written to each.
    """
    per_file = max(1, min(elements, FILE_ELEMENTS) // (stream.seq_length + 1))
    tasks = []
    for number, first in enumerate(range(0, stream.rows, per_file)):
        last = min(first + per_file, stream.rows)
        pieces, skip = stream.part(first, last)
        used = {int(s): shards[s] for s in np.unique(pieces["shard"]) if s != CONSTANT}
        tasks.append(
            FileTask(folder, split, number, last - first, stream.seq_length, pieces, skip, used, constants, pad)
        )
    return tasks


def write_file(task: FileTask) -> SequenceFile:
    """Write one file and its sidecar."""
    writer = SplitWriter(task.folder, task.split, task.seq_length, dtype=UINT32, first=task.number, rows=task.rows)
    for sequence in _rows(task):
        writer.write(sequence)
    (file,) = writer.finish()
    return file


def _rows(task: FileTask) -> Iterator[Sequence]:
    tables = {number: Tokenized(path).tokens() for number, path in task.shards.items()}
    tables[CONSTANT] = np.array(task.constants, np.uint32)
    length = task.seq_length
    pieces = iter(task.pieces.tolist())
    shard, source, start, left, opens = next(pieces)
    start, left, opens = start + task.skip, left - task.skip, opens and not task.skip
    row = np.full(length + 1, task.pad, np.uint32)
    filled, starts, of_row = 0, [0], source
    for number in range(task.rows):
        while filled <= length:
            if not left:
                following = next(pieces, None)
                if following is None:
                    break
                shard, source, start, left, opens = following
            if opens and filled:
                starts.append(filled)
            opens = False
            taken = min(left, length + 1 - filled)
            row[filled : filled + taken] = tables[shard][start : start + taken]
            start, left, filled = start + taken, left - taken, filled + taken
        yield Sequence(row, starts, filled, of_row)
        if number + 1 < task.rows:
            label = row[length]
            row = np.full(length + 1, task.pad, np.uint32) if number + 2 == task.rows else np.empty_like(row)
            row[0], filled, starts, of_row = label, 1, [0], source
