"""The keys that can be set, those among them that hold free text, and the one meant by a key that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_type_hints

from megalong.config.limits import CHOICES
from megalong.config.schema import Config
from megalong.recipe.folders import groups

OPEN = ("model.rope_scaling", "stage.rope_scaling")
"""Settings that hold a dictionary; its fields are checked by `rope.frequencies.check_scaling`."""

ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "global_batch_size",
    "max_steps": "steps",
    "output_dir": "run_dir",
    "lr_scheduler_type": "decay",
    "lr_decay_style": "decay",
    "lr_decay_iters": "decay_steps",
}
"""What other trainers call ours, for suggestions."""


def leaves(schema: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, type[Any], str]]:
    """Every setting that is not a group: its key, the dataclass that has it, and the field's name."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        inner = hints[f.name]
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from leaves(inner, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", schema, f.name


@cache
def settings() -> frozenset[str]:
    """Every key, groups included: `train`, `train.lr`, `cluster.nodes`, `cluster.nodes.value`."""
    found = set()
    for key, _, _ in leaves():
        parts = key.split(".")
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return frozenset(found)


@cache
def texts() -> frozenset[str]:
    """Keys whose value is any text: paths and names, but not a choice of a few."""
    found = set()
    for key, schema, name in leaves():
        kind, metadata = get_type_hints(schema)[name], schema.__dataclass_fields__[name].metadata
        is_text = kind is str or (isinstance(kind, UnionType) and str in get_args(kind))
        if is_text and CHOICES not in metadata:
            found.add(key)
    return frozenset(found)


def is_setting(key: str) -> bool:
    """Whether a key can be set: one of the schema, or inside a dictionary."""
    return key in settings() or any(key.startswith(f"{open_}.") for open_ in OPEN)


def no_such(key: str) -> str:
    """What to say of a key that does not exist, with those it may have been meant as."""
    names = sorted({name for name, _, _ in leaves()} | (set() if "." in key else set(groups())))
    group, _, last = key.rpartition(".")
    last = ELSEWHERE.get(last, last)
    meant = f"{group}.{last}".lstrip(".")
    close = [meant] if meant in names else difflib.get_close_matches(meant, names, n=3, cutoff=0.75)
    if not close:  # a key that is given in the wrong group, or in none
        ends = {name.rpartition(".")[2] for name in names}
        near = [last] if last in ends else difflib.get_close_matches(last, ends, n=1, cutoff=0.75)
        close = [name for name in names if name.rpartition(".")[2] in near][:3]
    hint = f" Did you mean {', '.join(close)}?" if close else " All settings: megalong/config/schema.py."
    return f"There is no setting {key!r}.{hint}"
