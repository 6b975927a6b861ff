"""The documents of a shard are read one after another, whatever its kind, faults among them, never all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megalong.data.manifest import TokenizerInfo
from megalong.data.pipeline.documents import Document, Fields, found_in
from megalong.data.pipeline.faults import Fault
from megalong.data.pipeline.inputs import Shard
from megalong.data.pipeline.lines import read_lines
from megalong.data.pipeline.megatron_files import read_megatron
from megalong.data.pipeline.tables import read_arrow, read_parquet
from megalong.runtime.errors import DataError


def read_shard(
    shard: Shard, fields: Fields, tokenizer: TokenizerInfo | None, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Document | Fault]:
    """Documents and faults of a shard, in the order of the files.

    Args:
        tokenizer: what a megatron shard was made with; others do not ask.
        on_bytes: called now and then with the bytes on disk that were read.

    Raises:
        DataError: a file cannot be read, or is not what its name says.
    """
    path = shard.paths[0]
    try:
        if shard.kind == "lines":
            yield from read_lines(path, fields, shard.start, shard.stop, on_bytes)
        elif shard.kind == "parquet":
            yield from read_parquet(path, fields)
        elif shard.kind == "arrow":
            yield from read_arrow(path, fields)
        elif shard.kind == "megatron":
            assert tokenizer is not None
            yield from read_megatron(path, tokenizer.vocab_size, tokenizer.eos_token_id, fields.limit)
        else:
            yield from _texts(shard, fields)
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read ({error.strerror or error}).") from error


def _texts(shard: Shard, fields: Fields) -> Iterator[Document | Fault]:
    """A document per file, with the fields `path` and `folder` (the outermost one: a repository, a book)."""
    for relative, path in zip(shard.files, shard.paths, strict=True):
        try:
            raw = path.read_bytes() if path.stat().st_size <= fields.limit else None
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
        if raw is None:
            yield Fault("too_large", str(path))
            continue
        folder = Path(relative).parts[0] if len(Path(relative).parts) > 1 else None
        values = {fields.text: raw, "path": relative, "folder": folder}
        yield found_in(values, fields, str(path))
