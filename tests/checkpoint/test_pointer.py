"""The newest whole checkpoint is found whatever a crash left behind."""

from pathlib import Path

import pytest

from megalong.checkpoint import pointer
from megalong.runtime.errors import CheckpointError


def make(root: Path, step: int, whole: bool = True) -> Path:
    folder = pointer.folder_of(root, step)
    folder.mkdir(parents=True)
    (folder / "megalong.json").write_text("{}")
    if whole:
        (folder / "metadata.json").write_text("{}")
    return folder


def test_the_pointer_names_the_newest(tmp_path: Path) -> None:
    first, second = make(tmp_path, 5), make(tmp_path, 10)
    pointer.point_to(tmp_path, first)
    assert pointer.newest(tmp_path) == first
    pointer.point_to(tmp_path, second)
    assert pointer.newest(tmp_path) == second


@pytest.mark.parametrize("content", ["", "step_00000099", "garbage"])
def test_a_broken_pointer_falls_back_to_the_newest_whole_one_with_a_warning(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture
) -> None:
    make(tmp_path, 5)
    newest = make(tmp_path, 10)
    make(tmp_path, 15, whole=False)
    (tmp_path / pointer.POINTER).write_text(content)
    assert pointer.newest(tmp_path) == newest
    assert "falling back to step_00000010" in capsys.readouterr().err


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
