"""The newest whole checkpoint is found whatever a crash left behind."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint import pointer
from megalong.checkpoint.checksums import write_checksums
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import sha256_of


def make(root: Path, step: int, whole: bool = True) -> Path:
    folder = pointer.folder_of(root, step)
    folder.mkdir(parents=True)
    (folder / "megalong.json").write_text("{}")
    if whole:
        (folder / "metadata.json").write_text("{}")
    if whole:
        sums = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in folder.iterdir()}
        write_checksums(folder, sums)
    return folder


def test_the_pointer_names_the_newest(tmp_path: Path) -> None:
    first, second = make(tmp_path, 5), make(tmp_path, 10)
    pointer.point_to(tmp_path, first)
    assert pointer.newest(tmp_path) == first
    pointer.point_to(tmp_path, second)
    assert pointer.newest(tmp_path) == second


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"step_00000099",
        b"garbage",
        b"\xff\xfe\0",
        b"a" * 5000,
        b"step_" + b"1" * 5000,
        b"../5",
        b"step_0000\00010",
    ],
)
def test_a_broken_pointer_falls_back_to_the_newest_whole_one_with_a_warning(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture
) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    make(tmp_path, 15, whole=False)
    (tmp_path / pointer.POINTER).write_bytes(content)
    assert pointer.newest(tmp_path) == newest
    assert "falling back to step_00000010" in capsys.readouterr().err


def test_a_pointer_never_leads_out_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    newest, other = make(tmp_path / "run", 5), make(tmp_path / "other", 10)
    for name in (f"../other/{other.name}", str(other)):
        (tmp_path / "run" / pointer.POINTER).write_text(name)
        assert pointer.newest(tmp_path / "run") == newest
        assert "falling back to step_00000005" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda f: (f / "checksums.json").write_text("{}"), "it lists no file"),
        (lambda f: (f / "__1_0.distcp").write_text("x"), "__1_0.distcp is not in"),
        (lambda f: (f / "megalong.json").write_text("[]"), "megalong.json was changed"),
    ],
)
def test_a_newest_checkpoint_whose_lists_are_wrong_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture, spoil: Callable[[Path], object], said: str
) -> None:
    sound, newest = make(tmp_path, 5), make(tmp_path, 10)
    (newest / ".nfs0001").touch()
    pointer.point_to(tmp_path, newest)
    assert pointer.newest(tmp_path) == newest
    spoil(newest)
    assert pointer.newest(tmp_path) == sound
    assert said in capsys.readouterr().err


def test_without_any_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert pointer.newest(tmp_path / "nowhere") is None
    make(tmp_path, 5, whole=False)
    assert pointer.newest(tmp_path) is None


def test_a_path_may_be_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    folder = make(tmp_path / "run" / "checkpoints", 5)
    assert pointer.resolve(folder) == pointer.resolve(tmp_path / "run") == folder


def test_what_cannot_be_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        pointer.resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no whole checkpoint"):
        pointer.resolve(tmp_path)
    half = make(tmp_path / "run" / "checkpoints", 5, whole=False)
    (half / "__0_0.distcp").write_text("")
    with pytest.raises(CheckpointError, match="half-written"):
        pointer.resolve(half)


def test_pruning_keeps_the_newest_and_removes_what_was_interrupted(tmp_path: Path) -> None:
    steps = [make(tmp_path, s) for s in (1, 2, 3, 4)]
    (tmp_path / "step_00000005.partial").mkdir()
    pointer.prune(tmp_path, keep=2, permanent=steps[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == [steps[0].name, steps[2].name, steps[3].name]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A file that another client of NFS has open comes back as .nfsXXXX, and its folder stays."""
    old, new = make(tmp_path, 1), make(tmp_path, 2)
    (old / "busy").touch()
    unlink = os.unlink

    def busy(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("busy"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(os, "unlink", busy)
    assert pointer.prune(tmp_path, keep=1) == []
    assert "step_00000001 cannot be removed: [Errno 16]" in capsys.readouterr().err
    assert pointer.whole_ones(tmp_path) == [new]
    assert pointer.prune(tmp_path, keep=1) == []
    monkeypatch.undo()
    assert len(pointer.prune(tmp_path, keep=1)) == 1
    assert list(tmp_path.iterdir()) == [new]


def test_on_a_disk_that_became_read_only_pruning_is_a_warning_and_all_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    steps = [make(tmp_path, s) for s in (1, 2)]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, refuse)
    assert pointer.prune(tmp_path, keep=1) == []
    assert "Read-only" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"cannot be renamed to step_00000001\.damaged: Read-only"):
        pointer.set_aside(steps[0], "damaged")
    monkeypatch.undo()
    assert pointer.whole_ones(tmp_path) == steps


def test_what_is_set_aside_twice_is_kept_twice(tmp_path: Path) -> None:
    for n in range(3):
        folder = make(tmp_path, 10)
        (folder / "attempt").write_text(str(n))
        pointer.set_aside(folder, "superseded")
    found = {p.name: (p / "attempt").read_text() for p in tmp_path.iterdir()}
    name = "step_00000010.superseded"
    assert found == {name: "0", f"{name}.2": "1", f"{name}.3": "2"}
