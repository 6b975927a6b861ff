"""Before it is tokenized a document is its text and the few fields that choosing and joining need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalong.data.pipeline.faults import Fault


@dataclass(frozen=True)
class Fields:
    """Where the parts of a document stand; dots go into objects."""

    text: str
    source: str | None
    join: str | None
    limit: int
    """Bytes of text at most."""

    @property
    def columns(self) -> list[str]:
        """The outermost names."""
        return sorted({name.partition(".")[0] for name in (self.text, self.source, self.join) if name})


@dataclass(frozen=True)
class Document:
    """One document."""

    text: str | np.ndarray
    """The text; or, of a source that is tokenized already, [n] uint32 ids without the end-of-text token."""
    source: str | None
    join: str | None
    """Documents that agree in it become one; None: one of its own."""


def found_in(values: Mapping[str, Any], fields: Fields, where: str) -> Document | Fault:
    """A document from its fields (a line of JSON, a row of a table)."""
    text = inside(values, fields.text)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return Fault("bad_utf8", where)
    if not isinstance(text, str):
        return Fault("no_text", where)
    if len(text) > fields.limit:  # bytes are at least as many as characters
        return Fault("too_large", where)
    source = None
    if fields.source is not None:
        source = inside(values, fields.source)
        if not isinstance(source, str) or not source:
            return Fault("no_source", where)
    join = inside(values, fields.join) if fields.join is not None else None
    return Document(text, source, None if join is None else str(join))


def inside(values: Any, key: str) -> Any:
    """The value at a key whose dots go into objects; None where there is none."""
    if isinstance(values, Mapping) and key in values:
        return values[key]
    for name in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(name)
    return values
