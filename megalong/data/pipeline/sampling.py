"""A look at a few documents before hours of work says whether they can be read, and whether they suffice."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megalong.data.pipeline.documents import Document, Fields
from megalong.data.pipeline.faults import KINDS, Fault
from megalong.data.pipeline.inputs import Shard
from megalong.data.pipeline.reading import read_shard
from megalong.data.tokenizer import TextTokenizer
from megalong.runtime.errors import DataError

SHARDS = 6
"""Shards looked at, of each source."""
DOCUMENTS = 128
"""Documents of each."""
CHARACTERS = 500_000
"""Text of each, about."""


@dataclass(frozen=True)
class Sample:
    """What was seen."""

    lengths: dict[str, np.ndarray]
    """Source -> tokens of each document seen."""
    factor: dict[str, float]
    """Source -> how many times as much there is in all, by bytes."""
    complete: bool
    """Every document was seen."""

    def tokens(self, source: str) -> int:
        """Tokens of a source in all, as the sample has it."""
        return int(self.lengths[source].sum() * self.factor[source])


def look(shards: list[Shard], fields: Fields, tokenizer: TextTokenizer) -> Sample | None:
    """Read some documents of some shards.

    Returns:
        what they say of all; None where nothing can be said (tables that are larger than what was read of them).

    Raises:
        DataError: most of what was seen is broken.
    """
    lengths: dict[str, list[int]] = {}
    seen: dict[str, tuple[int, int]] = {}  # source of shards -> bytes seen, bytes in all
    where: dict[str, str] = {}
    complete = knows = True
    for name in dict.fromkeys(shard.source for shard in shards):
        mine = [shard for shard in shards if shard.source == name]
        picked = mine[:: max(1, -(-len(mine) // SHARDS))]
        complete &= len(picked) == len(mine)
        read = 0
        for shard in picked:
            found, bytes_read = _read(shard, fields, tokenizer)
            complete &= bytes_read == shard.bytes
            knows &= bytes_read > 0
            read += bytes_read
            for source, tokens in _lengths(found, name, tokenizer):
                lengths.setdefault(source, []).append(tokens)
                where[source] = name
        seen[name] = (read, sum(shard.bytes for shard in mine))
    if not knows:
        return None
    factor = {source: seen[name][1] / max(1, seen[name][0]) for source, name in where.items()}
    return Sample({s: np.array(n, np.int64) for s, n in lengths.items()}, factor, complete)


def _read(shard: Shard, fields: Fields, tokenizer: TextTokenizer) -> tuple[list[Document], int]:
    """Some documents, and the bytes of the shard that they took (0: not known)."""
    told = [0]
    found: list[Document] = []
    faults: Counter[str] = Counter()
    examples: list[str] = []
    characters = 0
    documents = read_shard(shard, fields, tokenizer.info, lambda count: told.__setitem__(0, count - shard.start))
    for number, document in enumerate(documents, 1):
        if isinstance(document, Fault):
            faults[document.kind] += 1
            examples.append(document.where)
        else:
            found.append(document)
            characters += len(document.text)
        if number >= DOCUMENTS or characters > CHARACTERS:
            break
    else:
        told = [shard.bytes]
    if 2 * sum(faults[kind] for kind in KINDS) > len(found) + sum(faults.values()):
        ((kind, count), *_) = faults.most_common(1)
        raise DataError(
            f"{shard.name}: most of the first documents cannot be used, {count} of {len(found) + sum(faults.values())} "
            f"being {KINDS[kind]} (data.text_key={fields.text}, data.source_key={fields.source or 'null'}), such as "
            f"{examples[0]}."
        )
    return found, min(told[0], shard.bytes)


def _lengths(documents: list[Document], name: str, tokenizer: TextTokenizer) -> list[tuple[str, int]]:
    texts = [d.text for d in documents if isinstance(d.text, str)]
    encoded = iter(tokenizer.ids(texts))
    return [(d.source or name, len(next(encoded) if isinstance(d.text, str) else d.text)) for d in documents]
