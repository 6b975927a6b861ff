"""What does a JSON file say that anyone may have written? Everything that is wrong with it becomes one named error.

Python's own reader lets more through than JSON is: NaN and Infinity, numbers that become infinite (1e999), a name that
appears twice (the last one wins without a word). Here they are refused, since nobody means them in a configuration.
What it raises is of many kinds (a list 100,000 deep is a RecursionError); here it is a `ValueError`, or the error that
the caller names.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from megalong.runtime.errors import UserError

LIMIT = 64_000_000
"""Bytes: the largest file that is read, a tokenizer's configuration or the index of a sharded model, has a few
millions. Parsing takes many times the size in memory."""

DEPTH = 50
"""Levels of nesting: what is read is also copied and written by code that goes down level by level."""

_TOO_DEEP = f"it is nested more than {DEPTH} levels deep"
_T = TypeVar("_T")


def parse(text: bytes, allow_nan: bool = False) -> Any:
    """The value that JSON text describes.

    Args:
        allow_nan: NaN and the infinities are numbers (a loss that was measured may be one).

    Raises:
        ValueError: not JSON in UTF-8, or a name stands twice in one object; nothing else is raised.
    """
    constant = None if allow_nan else _refuse
    number = float if allow_nan else _finite
    try:
        decoded = text.decode("utf-8")
        found = json.loads(decoded, object_pairs_hook=_unique, parse_constant=constant, parse_float=number)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _is_deep(found):
        raise ValueError(_TOO_DEEP)
    return found


def read_json(path: Path, error: type[UserError], advice: str = "", allow_nan: bool = False) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        error: what is raised.
        advice: what to do then, the end of the message.

    Raises:
        error: missing, unreadable, too large, not JSON, or another value than an object.
    """
    advice = f" {advice}" if advice else ""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        if path.stat().st_size > LIMIT:
            raise ValueError(f"it has {path.stat().st_size:,} bytes; at most {LIMIT:,} are read")
        found = parse(path.read_bytes(), allow_nan)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {shown(found)} instead of a JSON object")
    except FileNotFoundError as cause:
        raise error(f"{path} is missing.{advice}") from cause
    except json.JSONDecodeError as cause:
        raise error(f"{path} is damaged: not JSON ({cause}).{advice}") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{path} is damaged: {cause}.{advice}") from cause
    return found


def read_as(kind: type[_T], raw: Any, where: str, error: type[UserError], advice: str = "", exact: bool = True) -> _T:
    """A JSON value as a dataclass: every field there, of its declared type, no other.

    Args:
        kind: dataclass whose fields are int, float, str, bool, None, dict, lists, tuples and dataclasses of those.
        raw: the parsed value.
        where: what messages call the value.
        error: what is raised.
        exact: False: names that the dataclass does not know are left out instead of refused.

    Raises:
        error: a field is missing, unknown or of another type; it is named.
    """
    try:
        found: _T = _fitted(kind, raw, "", exact)
    except ValueError as cause:
        raise error(f"{where}{cause}.{' ' + advice if advice else ''}") from None
    return found


def shown(value: Any, width: int = 60) -> str:
    """A value as messages show it: short, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # an integer of more than 4,300 digits has no repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= width else f"{text[: width - 3]}..."


def is_plain_name(name: Any) -> bool:
    """Whether a value from a document can be the name of a file beside it: no path, nothing a file system refuses."""
    try:
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
            return False
        return len(os.fsencode(name)) <= 255
    except ValueError:  # half of a surrogate pair
        return False


def _fitted(kind: Any, raw: Any, at: str, exact: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return raw
    if origin is UnionType:
        if raw is None and NoneType in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not NoneType]
        return _fitted(kind, raw, at, exact)
    if origin in (list, tuple):
        if not isinstance(raw, list):
            raise ValueError(f"{at}: a list was expected, found {shown(raw)}")
        return origin(_fitted(arguments[0], value, f"{at}[{i}]", exact) for i, value in enumerate(raw))
    if origin is dict:
        if not isinstance(raw, dict):
            raise ValueError(f"{at}: an object was expected, found {shown(raw)}")
        return {name: _fitted(arguments[1], value, f"{at}[{name}]", exact) for name, value in raw.items()}
    if is_dataclass(kind):
        return _dataclass(kind, raw, at, exact)
    if kind is float and type(raw) is int and abs(raw) < 2**1023:
        return float(raw)
    if type(raw) is not kind:  # not isinstance: a bool is no int here
        raise ValueError(f"{at}: {kind.__name__} was expected, found {shown(raw)}")
    return raw


def _dataclass(kind: Any, raw: Any, at: str, exact: bool) -> Any:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{at}: an object was expected, found {shown(raw)}")
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    missing, unknown = sorted(known - set(raw)), sorted(set(raw) - known) if exact else []
    if missing or unknown:
        raise ValueError(f"{at}: missing keys {missing}, unknown keys {shown(unknown)}")
    return kind(**{name: _fitted(hints[name], raw[name], f"{at}: {name}", exact) for name in known})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:200]} appears twice in one object")
        found[name] = value
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        nested = [v for v in level if isinstance(v, dict | list)]
        if not nested:
            return False
        level = [child for v in nested for child in (v.values() if isinstance(v, dict) else v)]
    return True


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
