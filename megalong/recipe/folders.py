"""The folders that configuration files are read from: conf/, and those that a user adds in front of or behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONF = (Path(__file__).resolve().parents[1] / "conf").resolve()
"""In a checkout a link to its conf/; where megalong is installed a folder of the package."""


def all_folders(added: Sequence[str] = ()) -> list[Path]:
    """In the order in which they are searched; the same file in two of them is taken from the first.

    Args:
        added: `Config.searchpath`; None of it: conf/ alone.
    """
    return [Path(folder) for folder in added] or [CONF]


def find(group: str, name: str, added: Sequence[str] = ()) -> Path | None:
    """The file that `group=name` stands for."""
    return next((p for f in all_folders(added) if (p := f / group / f"{name}.yaml").is_file()), None)


def names(group: str, added: Sequence[str] = ()) -> list[str]:
    """What `group=name` can choose, in alphabetical order."""
    return sorted({p.stem for folder in all_folders(added) for p in (folder / group).glob("*.yaml")})


def groups(added: Sequence[str] = ()) -> list[str]:
    """The groups that files can be chosen of."""
    found = {p.name for folder in all_folders(added) for p in folder.iterdir() if p.is_dir()}
    return sorted(name for name in found if names(name, added))
