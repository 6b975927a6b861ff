"""Documents and files as an enemy, a bad disk or a careless editor would leave them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from megalong.runtime.errors import UserError

# A marker that is written as raw text: what json.dumps itself would never write.
_RAW = {
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "5000 digits": "9" * 5000,
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep enough to parse": '{"a":' * 300 + "1" + "}" * 300,
}
RAW = [f"\ue000{name}" for name in _RAW]

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([-1, 0, 3, 2**31, 2**63, 2**70, 10**400, 0.0, -0.0, -1.5, 0.5, 1e-320, 1e308, 1e19]),
    st.sampled_from(["", "false", "true", "1", "llama", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\ud800", *RAW]),
    st.text(max_size=4),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=2), max_leaves=5
)


def as_bytes(document: Any) -> bytes:
    """JSON text of a document, markers replaced by what they stand for."""
    text = json.dumps(document)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(f"\ue000{name}"), raw)
    return text.encode()


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from _places(value, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one of its values replaced, removed, wrapped or copied to another name."""
    document = copy.deepcopy(document)
    path = draw(st.sampled_from(list(_places(document))))
    if not path:
        return draw(VALUES)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "wrap", "copy"]))
    value = parent[path[-1]]
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "wrap":
        parent[path[-1]] = draw(st.sampled_from([[value], {"a": value}, str(value), [value, value]]))
    elif kind == "copy" and isinstance(parent, dict):
        parent[draw(st.text(max_size=5))] = value
    else:
        parent[path[-1]] = draw(VALUES)
    return document


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some of them changed, cut off, cut out or added."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "cut", "remove", "insert", "nothing left"]))
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if kind == "flip":
        for place in [at, *draw(st.lists(st.integers(0, max(0, len(data) - 1)), max_size=2))]:
            data = data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
        return data
    if kind == "cut":
        return data[:at]
    if kind == "remove":
        return data[:at] + data[at + draw(st.integers(1, 40)) :]
    if kind == "insert":
        return data[:at] + draw(st.binary(min_size=1, max_size=9)) + data[at:]
    return b""


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """What is read, or the one message; anything else that is raised fails the test."""
    try:
        return read(), ""
    except UserError as error:
        text = str(error)
    assert 0 < len(text) < 2000
    return None, text
