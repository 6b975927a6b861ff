"""Are a directory's files still what was written? SHA-256 of every file, in `checksums.json`.

The list is {name: {"bytes": size, "sha256": hexadecimal}}, the same in Hugging Face and Megatron directories. A
directory that someone else wrote has none; then only what the formats themselves can tell is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import sha256_of, write_text

CHECKSUMS = "checksums.json"


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The list of a directory, or None where there is none.

    Raises:
        CheckpointError: the list itself is damaged.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in sums.items():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str) or ".." in Path(name).parts:
                raise ValueError(f"the entry of {name} makes no sense")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return dict(sums)


def write_checksums(folder: Path, sums: dict[str, dict[str, Any]]) -> None:
    """Write the list of a directory."""
    write_text(folder / CHECKSUMS, json.dumps(dict(sorted(sums.items())), indent=1) + "\n")


class Checksums:
    """Checks files of a directory when they are first used, each once.

    Args:
        folder: the directory; without `checksums.json` nothing is checked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sums = folder, read_checksums(folder)
        self._checked: set[str] = set()

    def check(self, name: str, contents: bool = True) -> None:
        """Compare a file with the list.

        Args:
            name: file name relative to the directory; one that the list does not know is not checked.
            contents: False: only existence and size.

        Raises:
            CheckpointError: missing, cut short or changed.
        """
        entry = (self.sums or {}).get(name)
        if entry is None or name in self._checked:
            return
        file = self.folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, which {CHECKSUMS} lists.")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {entry['bytes']}: damaged.")
        if contents:
            if sha256_of(file) != entry["sha256"]:
                raise CheckpointError(f"{file} was changed after it was written (SHA-256 differs): damaged.")
            self._checked.add(name)

    def check_all(self) -> int:
        """Check every file of the list; returns how many there are."""
        for name in self.sums or {}:
            self.check(name)
        return len(self.sums or {})
