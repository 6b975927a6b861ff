"""One task leaves behind a folder with the token ids of a shard and an index of its documents.

    tokens.bin     uint32 ids of all documents one after another, nothing between them
    documents.npy  uint64 [6, documents], one row per field of `COLUMNS`, documents in ascending order of `place`
    report.json    names of sources, counts, faults by kind, histogram of lengths

`place` is the hash of the text, or of the key by which documents are joined: any range of it holds a random part of all
documents, in every shard one stretch of the index, and everything that has to meet (copies, parts of one whole).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megalong.runtime.errors import DataError
from megalong.runtime.json_file import read_as, read_json

COLUMNS = ("place", "hash", "start", "length", "number", "source")
"""Place; hash of the text; first token in tokens.bin; tokens; number in the shard as read; index of the source."""
TOKENS, INDEX, REPORT = "tokens.bin", "documents.npy", "report.json"
TOKEN = np.dtype("<u4")
_AGAIN = "Remove this folder; the next run of tools/prepare_data.py makes it again."


@dataclass(frozen=True)
class Report:
    """What a task found."""

    shard: str
    bytes: int
    """Read from disk."""
    characters: int
    documents: int
    tokens: int
    sources: list[str]
    dropped: dict[str, int]
    """Why -> documents that are no fault and still not there."""
    faults: dict[str, int]
    examples: list[str]
    """Where the first faults are."""
    histogram: dict[str, list[int]]
    """Source -> documents of 2^(i-1) to 2^i - 1 tokens."""


def histogram(lengths: np.ndarray) -> list[int]:
    """Documents by number of tokens: entry i counts lengths from 2^(i-1) to 2^i - 1."""
    bits = np.ceil(np.log2(lengths.astype(np.float64) + 1)).astype(np.int64)
    return np.bincount(bits).tolist() if len(bits) else []


def write(folder: Path, columns: np.ndarray, report: Report) -> None:
    """Write index and report beside a tokens.bin that is there already.

    Args:
        columns: [6, documents] uint64 in the order of reading.
    """
    order = np.lexsort((columns[4], columns[0]))
    np.save(folder / INDEX, np.ascontiguousarray(columns[:, order]))
    (folder / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")


class Tokenized:
    """A shard that was tokenized.

    Raises:
        DataError: the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.report = read_as(Report, read_json(folder / REPORT, DataError, _AGAIN), str(folder), DataError, _AGAIN)
        size = (folder / TOKENS).stat().st_size if (folder / TOKENS).is_file() else -1
        if size != TOKEN.itemsize * self.report.tokens:
            raise DataError(f"{folder / TOKENS} has {size:,} bytes for {self.report.tokens:,} tokens. {_AGAIN}")
        if self.index().shape != (len(COLUMNS), self.report.documents):
            raise DataError(f"{folder / INDEX} does not hold {self.report.documents:,} documents. {_AGAIN}")

    def index(self) -> np.ndarray:
        """[6, documents] uint64, mapped."""
        return _mapped_index(self.folder / INDEX)

    def tokens(self) -> np.ndarray:
        """[tokens] uint32, mapped."""
        return _mapped_tokens(self.folder / TOKENS)


@lru_cache(maxsize=1024)
def _mapped_index(path: Path) -> np.ndarray:
    try:
        found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). {_AGAIN}") from error
    return found


@lru_cache(maxsize=1024)
def _mapped_tokens(path: Path) -> np.ndarray:
    return np.asarray(np.memmap(path, TOKEN, "r")) if path.stat().st_size else np.empty(0, TOKEN)
