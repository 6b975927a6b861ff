"""Files and folders that exist only when they are whole."""

from pathlib import Path

import pytest

from megalong.runtime.files import commit_folder, fresh_folder, hold, partial_of, sha256_of, write_text


def test_a_text_is_replaced_in_one_step_and_nothing_is_left_aside(tmp_path: Path) -> None:
    target = tmp_path / "pointer"
    write_text(target, "one")
    write_text(target, "two")
    assert target.read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_gets_its_name_when_it_is_committed(tmp_path: Path) -> None:
    target = tmp_path / "step"
    partial = partial_of(target)
    fresh_folder(partial)
    (partial / "sub").mkdir()
    (partial / "sub" / "file").write_text("x")
    assert not target.exists()
    commit_folder(partial, target)
    assert (target / "sub" / "file").read_text() == "x"
    assert not partial.exists()


def test_what_an_interrupted_writer_left_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    fresh_folder(tmp_path / "a")
    assert list((tmp_path / "a").iterdir()) == []


def test_what_cannot_be_removed_is_named(tmp_path: Path) -> None:
    (tmp_path / "step.partial").touch()  # a file where a folder is expected: rmtree refuses it
    with pytest.raises(OSError, match=r"step\.partial was left by an interrupted save and cannot be removed") as caught:
        fresh_folder(tmp_path / "step.partial")
    assert "step.partial" in caught.value.strerror


def test_a_failed_write_leaves_the_old_text(tmp_path: Path) -> None:
    target = tmp_path / "pointer"
    write_text(target, "old")
    partial_of(target).mkdir()  # the write aside fails
    with pytest.raises(OSError, match="directory"):
        write_text(target, "new")
    assert target.read_text() == "old"


def test_the_checksum_is_sha256sums(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_is_held_by_one_process_until_it_lets_go(tmp_path: Path) -> None:
    mine = hold(tmp_path / "run")
    assert mine is not None
    assert hold(tmp_path / "run") is None
    mine.close()
    again = hold(tmp_path / "run")
    assert again is not None
    again.close()
