"""The texts of a source as it stands: all of them, or an error that names the first that cannot be read.

The same formats as a recipe's sources (`pipeline`), with no share of faults allowed and nothing chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megalong.data.pipeline.documents import Fields
from megalong.data.pipeline.faults import KINDS, Fault
from megalong.data.pipeline.inputs import Shard, shards_of
from megalong.data.pipeline.reading import read_shard
from megalong.data.pipeline.settings import Settings
from megalong.runtime.errors import DataError

FIELDS = Fields(text="text", source=None, join=None, limit=2**40)


@dataclass(frozen=True)
class Texts:
    """What a source holds."""

    shards: list[Shard]
    left_out: list[str]
    """What is there and not read, for people: one line per kind, with counts and bytes."""

    @property
    def bytes(self) -> int:
        """Size on disk of what is read."""
        return sum(shard.bytes for shard in self.shards)

    def read(self, on_bytes: Callable[[int], None] = lambda count: None) -> Iterator[str]:
        """One text per text file, line of JSON or row of a table, in the order of the files.

        Args:
            on_bytes: called with the size on disk of what was read since, for progress.

        Raises:
            DataError: a file cannot be read or ends too early, or one of its documents has no text; it is named.
        """
        for shard in self.shards:
            told = 0

            def note(read: int, start: int = shard.start) -> None:
                nonlocal told
                on_bytes(read - start - told)
                told = read - start

            for found in read_shard(shard, FIELDS, None, note):
                if isinstance(found, Fault):
                    what = f" It is one of the {KINDS[found.kind]}." if found.kind in KINDS else ""
                    raise DataError(f"{found.where} cannot be read.{what}")
                assert isinstance(found.text, str)
                yield found.text
            on_bytes(shard.bytes - told)


def texts_of(source: Path) -> Texts:
    """What a file or folder holds.

    Raises:
        DataError: nothing there, data in a format that is not read, two kinds of data where one has to be it, token
            ids instead of text, or a file or folder that cannot be read.
    """
    shards, left_out = shards_of(Settings(source=str(source)))
    if shards[0].kind == "megatron":
        raise DataError(f"{source} holds token ids (megatron .bin and .idx) and not text.")
    return Texts(shards, left_out)
