"""Where do texts come from? A folder of text files, or of JSON lines in the SlimPajama format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from megalong.runtime.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl",)


def source_files(source: Path) -> list[Path]:
    """The files below `source` (or `source` itself) that hold text, in sorted order.

    Raises:
        DataError: nothing there, or nothing in a format that is read.
    """
    if source.is_file():
        files = [source]
    elif source.is_dir():
        files = sorted(p for p in source.rglob("*") if p.is_file())
    else:
        raise DataError(f"There is no source {source}.")
    known = [p for p in files if p.suffix in TEXT_SUFFIXES + JSON_SUFFIXES]
    if not known:
        packed = any(p.suffix in (".zst", ".gz", ".xz", ".zip") for p in files)
        hint = " Unpack the compressed files first (zstd -d, gzip -d)." if packed else ""
        raise DataError(f"{source} holds no file ending in {', '.join(TEXT_SUFFIXES + JSON_SUFFIXES)}.{hint}")
    return known


def read_texts(files: list[Path], on_bytes: Callable[[int], None] | None = None) -> Iterator[str]:
    """One text per text file, one per line of JSON with a "text" field.

    Args:
        on_bytes: called with the size of what was read, for progress.

    Raises:
        DataError: a file that is not UTF-8, or a line that is not an object with a "text"; both are named.
    """
    for path in files:
        if path.suffix in JSON_SUFFIXES:
            with path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_of(line, f"{path}:{number}")
                    if on_bytes is not None:
                        on_bytes(len(line))
        else:
            raw = path.read_bytes()
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
            if on_bytes is not None:
                on_bytes(len(raw))


def _text_of(line: bytes, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{where}: not a JSON object with a "text" field ({type(error).__name__}: {error}).') from error
    if not isinstance(text, str):
        raise DataError(f'{where}: "text" is {type(text).__name__}, not a string.')
    return text
