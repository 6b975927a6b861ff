"""A data folder comes to exist only when it is whole: written under `<name>.partial`, then renamed once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megalong.runtime.aside import Aside, refuse_name
from megalong.runtime.errors import DataError


def refuse_existing(target: Path, size: int = 0) -> None:
    """Check, before hours of work, that a data folder can get this name and has room.

    Args:
        size: bytes that it will have at least.

    Raises:
        DataError: it exists already, is no name for a folder, cannot be written, or its disk has less room.
    """
    refuse_name(target, DataError)
    if target.exists():
        raise DataError(f"{target} exists already; it is left as it is. Remove it or choose another folder.")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".megalong-", dir=above))
    except OSError as error:
        raise DataError(
            f"{target} cannot be made: {above} cannot be written ({error.strerror}). Choose another folder."
        ) from error
    free = shutil.disk_usage(above).free
    if free < size:
        raise DataError(
            f"{target} will have {size / 2**30:,.3g} GiB at least, and its disk has {free / 2**30:,.3g} GiB free. Make "
            "room or choose another folder."
        )


@contextmanager
def output_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to write into; on success it becomes `target`, on an error it is removed.

    What an earlier, killed writer left is removed first; a `<target>.partial` that no writer made is left alone.

    Raises:
        DataError: `target` exists already or cannot be written, or its `.partial` is someone else's.
    """
    refuse_existing(target)
    aside = Aside(target, DataError)
    aside.claim()
    try:
        yield aside.folder
    except BaseException as error:
        aside.discard()
        if isinstance(error, OSError | SafetensorError):  # what was read has errors of its own by now
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"{target} could not be written ({reason}); nothing of it is left. Make room or choose another folder."
            ) from error
        raise
    aside.commit()
