"""May a conversion replace what has the name of its result? Only what a conversion wrote, as it was written.

A config.json alone says nothing: sources, repositories and other programs' models have one. A folder is ours when it is
of the kind that will be written and its `checksums.json` is true: exactly the files that it lists, of their sizes, and
with their SHA-256 where they are small (large ones would be hours of reading). A person's file among them, a `.git` or
a README, is then never lost. A checkpoint of a training run is not a conversion's, and holds the optimizer besides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megalong.checkpoint.checksums import CHECKSUMS, Checksums, read_checksums
from megalong.checkpoint.pointer import RUN_CONFIG
from megalong.runtime.errors import CheckpointError

SMALL = 64 << 20
"""Files up to this many bytes are compared by content."""


def refuse_replacing(target: Path, is_kind: Callable[[Path], bool]) -> None:
    """Check that an existing folder is empty, or what a conversion wrote.

    Args:
        is_kind: whether a folder is of the kind that will be written.

    Raises:
        CheckpointError: it is not; the reason is given, with the file.
    """
    if next(target.iterdir(), None) is None:
        return
    wrong = _wrong(target, is_kind)
    if wrong is not None:
        raise CheckpointError(
            f"{target} exists and is not just what a conversion wrote there: {wrong}. --overwrite does not remove it. "
            "Remove it yourself, or choose another name."
        )


def refuse_near(target: Path, source: Path) -> None:
    """Check that a target is neither the source nor around it nor inside it; links are followed.

    Raises:
        CheckpointError: it is.
    """
    ours, theirs = target.resolve(), source.resolve()
    if ours == theirs:
        raise CheckpointError(f"{target} is the source. Choose another name for the result.")
    if ours in theirs.parents:
        raise CheckpointError(f"{target} contains the source {source}. Choose another name for the result.")
    if theirs in ours.parents:
        raise CheckpointError(f"{target} lies inside the source {source}. Choose a name beside it for the result.")


def _wrong(folder: Path, is_kind: Callable[[Path], bool]) -> str | None:
    if not is_kind(folder):
        return "it is of another kind"
    if (folder / RUN_CONFIG).exists():
        return f"it is a checkpoint of a training run ({RUN_CONFIG})"
    try:
        sums = read_checksums(folder)
        if sums is None:
            return f"it has no {CHECKSUMS}"
        listed = {CHECKSUMS, *sums}
        folders = {str(above) for name in listed for above in Path(name).parents}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            known = name in folders if path.is_dir() else name in listed
            if path.is_symlink() or not known:
                return f"{name} is not in its {CHECKSUMS}"
        checksums = Checksums(folder)
        for name, entry in sums.items():
            checksums.check(name, contents=entry["bytes"] <= SMALL)
    except (CheckpointError, OSError) as error:
        return str(error).rstrip(".")
    return None
