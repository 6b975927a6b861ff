"""Where does a card go? Beside the run, or into an export, of which a person's own card is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megalong.checkpoint.checksums import CARD, CHECKSUMS, Checksums, write_checksums
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import partial_of, sha256_of

MARK = "megalong"
"""Tag by which a card that was written here is known."""


def write_card(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write a card and its pictures, each file in one step, and enter them in the list of checksums if there is one.

    Args:
        files: as `make_card` gives them.

    Raises:
        CheckpointError: the card in that folder is a person's, or the folder cannot be written.
    """
    try:
        _refuse_own(folder)
        sums = Checksums(folder).sums if folder.is_dir() else None
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = partial_of(path)
            aside.write_bytes(content)
            aside.replace(path)
        if sums is not None:
            entries = {n: {"bytes": len(c), "sha256": sha256_of(folder / n)} for n, c in files.items()}
            write_checksums(folder, {**sums, **entries})
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}.") from error
    return [folder / name for name in files]


def _refuse_own(folder: Path) -> None:
    path = folder / CARD
    if not path.is_file():
        return
    listed = (Checksums(folder).sums or {}).get(CARD) if (folder / CHECKSUMS).is_file() else None
    edited = listed is not None and listed["sha256"] != sha256_of(path)
    if edited or f"- {MARK}\n" not in path.read_text("utf-8", "replace"):
        raise CheckpointError(f"{path} was written or changed by somebody. Move it, or choose another --out.")
