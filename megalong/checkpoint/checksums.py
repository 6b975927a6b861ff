"""Are a directory's files still what was written? SHA-256 of every file, in `checksums.json`.

The list is {name: {"bytes": size, "sha256": hexadecimal}}, the same in Hugging Face and Megatron directories. It names
every file at any depth: one that it lacks could be a weight file or a tokenizer that nobody wrote, and is damage like
one that is gone. What no reader opens may lie beside: hidden files and folders (`.DS_Store`, `.git`, `.nfs...`; not
megatron-core's `.metadata`) and texts for people (`*.md`, `LICENSE*`, `NOTICE*`). A directory that someone else wrote
has no list; then only what the formats themselves can tell is checked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import sha256_of, write_text
from megalong.runtime.json_file import read_json, shown

CHECKSUMS = "checksums.json"
CARD = "README.md"
_READ_THOUGH_HIDDEN = (".metadata",)
_TEXTS = ("LICENSE*", "NOTICE*", "*.md")


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The list of a directory, or None where there is none.

    Raises:
        CheckpointError: the list itself is damaged, or empty.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    sums = read_json(path, CheckpointError)
    for name, entry in sums.items():
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        listed = isinstance(entry, dict) and (type(entry.get("bytes")), type(entry.get("sha256"))) == (int, str)
        if not inside or not listed:
            raise CheckpointError(f"{path} is damaged: the entry of {shown(name)} makes no sense.")
    if not sums:
        raise CheckpointError(f"{path} is damaged: it lists no file.")
    return sums


def write_checksums(folder: Path, sums: dict[str, dict[str, Any]]) -> None:
    """Write the list of a directory."""
    write_text(folder / CHECKSUMS, json.dumps(dict(sorted(sums.items())), indent=1) + "\n")


class Checksums:
    """Checks that a directory has the files of its list, and each of them when it is first used, once.

    Args:
        folder: the directory; without `checksums.json` nothing is checked.

    Raises:
        CheckpointError: the list is damaged, names a file that is missing, or lacks one that is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.sums = folder, read_checksums(folder)
        self._checked: set[str] = set()
        if self.sums is None:
            return
        present = set(_files_read(folder))
        for name in sorted(self.sums.keys() - present):
            if not (folder / name).is_file():  # a listed text for people may be there
                raise CheckpointError(f"{folder / name} is missing, which {CHECKSUMS} lists.")
        for name in sorted(present - self.sums.keys() - {CHECKSUMS}):
            raise CheckpointError(
                f"{folder / name} is not in {folder / CHECKSUMS}, which lists every file that was written. "
                "Remove it if it is yours, or use another copy of the folder."
            )

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
        """Check every file of the list but the card, which people edit; returns how many there are."""
        names = [name for name in self.sums or {} if name != CARD]
        for name in names:
            self.check(name)
        return len(names)


def _files_read(folder: Path, below: str = "") -> Iterator[str]:
    """Names, relative to the directory, of the files that a reader might open."""
    with os.scandir(folder / below) as entries:
        for entry in entries:
            name = f"{below}{entry.name}"
            if entry.name.startswith(".") and entry.name not in _READ_THOUGH_HIDDEN:
                continue
            if entry.is_dir():
                yield from _files_read(folder, f"{name}/")
            elif not any(PurePosixPath(entry.name).match(pattern) for pattern in _TEXTS):
                yield name
