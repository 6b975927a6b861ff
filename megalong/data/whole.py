"""How does a data folder come to exist only when it is whole? Written under `<name>.partial`, then renamed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalong.runtime.errors import DataError
from megalong.runtime.files import commit_folder, fresh_folder, partial_of


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a fresh `<target>.partial` to write into; on success it becomes `target`, on an error it is left behind.

    What an earlier, killed writer left under `<target>.partial` is removed first.

    Raises:
        DataError: `target` exists already.
    """
    if target.exists():
        raise DataError(f"{target} exists already; it is left as it is. Remove it or choose another folder.")
    partial = partial_of(target)
    fresh_folder(partial)
    yield partial
    commit_folder(partial, target)
