"""Documents are read batch by batch from tables: parquet files, and the Arrow files of a `datasets` folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megalong.data.pipeline.documents import Document, Fields, found_in, inside
from megalong.data.pipeline.faults import CUT, Fault

ROWS = 256
"""Rows at a time."""
PAGES = 2**20
"""Bytes of a column that are read at a time, instead of a whole row group."""


def read_parquet(path: Path, fields: Fields) -> Iterator[Document | Fault]:
    """The documents of a parquet file, row by row.

    Raises:
        OSError: the file cannot be read.
    """
    return _until_cut(_rows(_parquet_batches(path, fields), path, fields), path)


def read_arrow(path: Path, fields: Fields) -> Iterator[Document | Fault]:
    """The documents of one Arrow stream, as `datasets` writes them.

    Raises:
        OSError: the file cannot be read.
    """
    return _until_cut(_rows(_arrow_batches(path), path, fields), path)


def _parquet_batches(path: Path, fields: Fields) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as raw, pq.ParquetFile(raw, buffer_size=PAGES, pre_buffer=False) as file:
        columns = [name for name in file.schema_arrow.names if name in {*fields.columns, fields.text}]
        yield from file.iter_batches(ROWS, columns=columns)


def _arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(path)) as raw, pa.ipc.open_stream(raw) as stream:
        for batch in stream:
            yield from _parts(batch)


def _until_cut(documents: Iterator[Document | Fault], path: Path) -> Iterator[Document | Fault]:
    """What can be read of a file, and a fault where it is damaged."""
    try:
        yield from documents
    except (pa.ArrowException, OSError) as error:
        # arrow reports damage as OSError too, without the number of an error of the system
        if isinstance(error, OSError) and error.errno not in (None, 0):
            raise
        yield Fault(CUT, f"{path}: {' '.join(str(error).split())[:200]}")


def _parts(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, batch.num_rows, ROWS):
        yield batch.slice(start, ROWS)


def _rows(batches: Iterator[pa.RecordBatch], path: Path, fields: Fields) -> Iterator[Document | Fault]:
    number = 0
    for batch in batches:
        columns = [_values(batch.column(i), fields.limit) for i in range(batch.num_columns)]
        names = batch.schema.names
        for row in range(batch.num_rows):
            number += 1
            where = f"{path}, row {number}"
            try:
                values = {name: column(row) for name, column in zip(names, columns, strict=True)}
            except UnicodeDecodeError:
                yield Fault("bad_utf8", where)
                continue
            if inside(values, fields.text) is _TooLarge:
                yield Fault("too_large", where)
            else:
                yield found_in(values, fields, where)


class _TooLarge:
    """Stands for a text that is not even fetched."""


def _values(column: pa.Array, limit: int) -> Any:
    """Row -> value. A text comes as bytes: one that is not UTF-8 must not take the whole batch with it."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_binary())
        sizes = pc.binary_length(column)

        def text(row: int) -> Any:
            size = sizes[row].as_py()
            if size is None:
                return None
            return _TooLarge if size > limit else column[row].as_py().decode("utf-8")

        return text
    return lambda row: column[row].as_py()
