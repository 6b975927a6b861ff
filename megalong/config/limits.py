"""Which values may a setting have? A range or a choice stands beside each field; here they are written and checked.

A field that holds a number, a list of numbers or a `Fact` is made with `number`, a string of a few with `one_of`
(`within` and `among` where there is no default); tests/recipe/test_limits.py fails for a number without a range.
Whether None is allowed is a question of the field's type, not of its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from megalong.runtime.errors import ConfigError

RANGE = "range"
CHOICES = "choices"


@dataclass(frozen=True)
class Range:
    """Finite numbers between two ends."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    whole: bool = False
    """Whole numbers only (said of a `Fact`; an int is one by its type)."""

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (not self.whole or value == int(value))
        )

    def __str__(self) -> str:
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        ends = " and ".join(f"{word} {_plain(end)}" for word, end in words.items() if end is not None)
        return ("a whole number, " if self.whole else "") + (ends or "a finite number")


def _plain(end: float) -> str:
    return str(int(end)) if end == int(end) else f"{end:g}"


def within(**ends: Any) -> dict[str, Any]:
    """Metadata of a field that holds a number, a list of them or a `Fact`: it lies in `Range(**ends)`."""
    return {RANGE: Range(**ends)}


def among(*choices: str) -> dict[str, Any]:
    """Metadata of a field that holds one of a few names, or a list of them."""
    return {CHOICES: choices}


def number(default: Any, **ends: Any) -> Any:
    """A dataclass field with a default and a range."""
    return field(default=default, metadata=within(**ends))


def one_of(choices: tuple[str, ...], default: str | None) -> Any:
    """A dataclass field with a default and choices."""
    return field(default=default, metadata=among(*choices))


def violations(settings: Any, prefix: str = "") -> Iterator[str]:
    """What is wrong with the values of a dataclass instance, one sentence per value.

    Args:
        settings: instance of a dataclass of `megalong.config`.
        prefix: how keys begin, with the dot (`train.`).
    """
    for f in fields(settings):
        value, key = getattr(settings, f.name), prefix + f.name
        if CHOICES in f.metadata:
            if any(v is not None and v not in f.metadata[CHOICES] for v in _each(value)):
                yield f"{key}={value!r}: choose {_one(value)} of {', '.join(f.metadata[CHOICES])}."
        elif RANGE in f.metadata:
            if hasattr(value, "value") and hasattr(value, "source"):
                key, value = f"{key}.value", value.value
            if any(v is not None and v not in f.metadata[RANGE] for v in _each(value)):
                yield f"{key}={value}: must be {f.metadata[RANGE]}."
        elif is_dataclass(value):
            yield from violations(value, f"{key}.")


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one(value: Any) -> str:
    return "some" if isinstance(value, list) else "one"


def check_limits(settings: Any, prefix: str = "", where: str = "") -> None:
    """Refuse values outside their ranges and choices.

    Args:
        where: the file that the values are from, if they are from one.

    Raises:
        ConfigError: every wrong value with its key and what is allowed.
    """
    if wrong := list(violations(settings, prefix)):
        raise ConfigError((f"{where}: " if where else "") + "\n".join(wrong))
