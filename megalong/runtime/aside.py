"""A folder, or a file, is written beside its name, and gets the name in one step, whatever has it now.

Until it is whole, the folder `OUT` is `OUT.partial/new`. Beside `new` lies a mark: by it the next program knows what a
killed one left, and removes it; an `OUT.partial` without it is a person's own and is left alone. One rename gives the
name. Where a folder is to be replaced, the two exchange their names, so that at every moment `OUT` is the old folder
or the new one, whole; the old one is then `OUT.partial/new`, and goes. A result that is one file lies alone in `new`,
and takes the place of an older one as rename(2) has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

from megalong.runtime.errors import UserError
from megalong.runtime.files import partial_of, sync

MARK = ".megalong-partial"
_MARK_TEXT = b"A megalong program is writing this folder, or was killed while it did. The next one removes it.\n"
_NEW, _PROBES = "new", ("probe-a", "probe-b")
_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


class Aside:
    """A folder on its way to its name.

    Args:
        target: the name.
        error: class of the errors that are raised.
        file: the name is that of one file, which is written as `folder / target.name`.
    """

    def __init__(self, target: Path, error: type[UserError], file: bool = False) -> None:
        self.target, self._error, self._file = target, error, file
        self.partial = target.parent  # known once the name is
        self._replaces = False
        self._lock = -1
        self._made: list[Path] = []

    @property
    def folder(self) -> Path:
        """Where to write."""
        return self.partial / _NEW

    def claim(self, replace: bool = False) -> None:
        """Make an empty `folder`, alone with it until `commit` or `discard`; folders above the target are made too.

        Args:
            replace: the target exists and will be replaced.

        Raises:
            UserError: the name cannot be one of a new folder, is taken, or is being written; `OUT.partial` is not ours.
        """
        try:
            self._claim(replace)
        except BaseException as error:
            self.keep()
            self._unmake()
            if isinstance(error, OSError | ValueError):  # ValueError: a zero byte in the name
                raise self._error(f"{self.target} cannot be written: {error}.") from error
            raise

    def commit(self) -> None:
        """Sync everything and give the folder its name.

        Raises:
            UserError: the disk failed; or the name is taken meanwhile: then the whole folder is left where it lies.
        """
        try:
            for path in (*self.folder.rglob("*"), self.folder):
                sync(path)
        except OSError as error:
            self.discard()
            raise self._error(f"{self.target} cannot be written: {error}.") from error
        try:
            if self._file:
                self._name_file()
            elif self._replaces and os.path.lexists(self.target):
                exchange(self.folder, self.target)
            else:
                os.rename(self.folder, self.target)
        except OSError as error:
            self.keep()
            raise self._error(
                f"{self.target} cannot be given its name: {error}. Nothing is lost: the result is whole and lies in "
                f"{self.folder}. Move it to another name before you run this again."
            ) from error
        try:
            sync(self.partial)
            sync(self.target.parent)
        except OSError as error:
            raise self._error(f"{self.target} is whole, but its name may be lost in a crash: {error}.") from error
        finally:
            self._remove()
            self.keep()

    def _name_file(self) -> None:
        made = self.folder / self.target.name
        if self._replaces:
            os.replace(made, self.target)
            return
        try:
            os.link(made, self.target)  # unlike a rename, it refuses a name that was taken meanwhile
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or os.path.lexists(self.target):
                raise
            os.rename(made, self.target)  # a file system without links

    def discard(self) -> None:
        """Remove what was written."""
        self._remove()
        self.keep()
        self._unmake()

    def keep(self) -> None:
        """Leave what was written where it lies; the next program that wants the name removes it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _claim(self, replace: bool) -> None:
        refuse_name(self.target, self._error, self._file)
        if os.path.lexists(self.target) and not replace:
            raise self._error(f"{self.target} exists already; it is left as it is. Remove it or choose another name.")
        self.partial, self._replaces = partial_of(self.target), replace
        self._made = [above for above in self.target.parents if not above.exists()]
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise self._error(self._foreign())
        self.partial.mkdir(exist_ok=True)
        left = os.listdir(self.partial)
        if left and MARK not in left:
            raise self._error(self._foreign())
        mark = self.partial / MARK
        self._lock = os.open(mark, os.O_RDWR | os.O_CREAT, 0o644)  # for writing: NFS locks nothing else
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = mark.stat().st_ino == os.fstat(self._lock).st_ino  # not that of one that was just committed
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise self._error(f"another program is writing {self.partial} right now. Wait for it.")
        os.pwrite(self._lock, _MARK_TEXT, 0)
        for name in left:
            if name != MARK:
                _remove(self.partial / name)
        if replace and not self._file:
            self._try_exchange()
        self.folder.mkdir()

    def _foreign(self) -> str:
        return (
            f"{self.partial} is in the way: it is where {self.target.name} would be written, and what is there has no "
            f"mark ({MARK}) of this program. It is left as it is. Move or remove it, or choose another name."
        )

    def _try_exchange(self) -> None:
        """Whether names can be exchanged is found out before the work, not after it."""
        a, b = (self.partial / name for name in _PROBES)
        a.mkdir()
        b.mkdir()
        try:
            if os.stat(self.target).st_dev != os.stat(self.partial).st_dev:
                raise OSError(errno.EXDEV, "it is a file system of its own (a mount)")
            exchange(a, b)
        except OSError as error:
            self._remove()
            raise self._error(
                f"{self.target} cannot be replaced in one step here: {error.strerror}. Remove it yourself, or choose "
                "another name."
            ) from error
        a.rmdir()
        b.rmdir()

    def _remove(self) -> None:
        """Everything, the mark last; what cannot be removed stays marked, and the next program tries again."""
        with contextlib.suppress(OSError):
            for name in os.listdir(self.partial):
                if name != MARK:
                    _remove(self.partial / name)
            (self.partial / MARK).unlink()
            self.keep()  # an open file would leave a .nfs... behind
            self.partial.rmdir()

    def _unmake(self) -> None:
        for above in self._made:
            with contextlib.suppress(OSError):
                above.rmdir()


def refuse_name(target: Path, error: type[UserError], file: bool = False) -> None:
    """Check that a path can be the name of a folder (with `file`: of a file) to make.

    Raises:
        UserError: `.`, `/` or another path without a name of its own, a link, or a path below a file.
    """
    if target.name in ("", ".."):
        what = "file" if file else "folder"
        raise error(f"'{target}' is no name for a {what} to make. Give one, such as {target / 'out'}.")
    try:
        if target.is_symlink():
            raise error(f"{target} is a link to {os.readlink(target)}. Give what it means itself, or another name.")
        if target.exists() and target.is_dir() == file:
            raise error(f"{target} exists already and is a {'folder' if file else 'file'}. Choose another name.")
        above = next(path for path in target.absolute().parents if path.exists())
        if not above.is_dir():
            raise error(f"{target} cannot be made: {above} is a file. Choose another name.")
    except OSError as failure:
        raise error(f"'{target}' cannot be made: {failure}.") from failure


def exchange(a: Path, b: Path) -> None:
    """Exchange two names of one file system in one step, by Linux' renameat2(2).

    Raises:
        OSError: one does not exist, or (EINVAL, ENOSYS) the file system or the kernel cannot do it.
    """
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(a), os.fsencode(b)
    if _LIBC.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(a), None, str(b))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
