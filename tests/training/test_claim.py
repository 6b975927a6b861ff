"""A run_dir is claimed before anything in it is read, and an attempt that comes to nothing leaves no trace."""

from pathlib import Path

import pytest

from megalong.runtime.errors import ConfigError
from megalong.runtime.files import LOCK, hold
from megalong.training.claim import RunClaim


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = RunClaim(tmp_path / "run")
    with pytest.raises(ConfigError, match="in use by another run"):
        RunClaim(tmp_path / "run")
    first.release()
    RunClaim(tmp_path / "run").release()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    RunClaim(tmp_path / "a" / "b" / "run").withdraw()
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_or_was_written_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    RunClaim(tmp_path / "mine" / "run").withdraw()
    assert (tmp_path / "mine").is_dir()
    claim = RunClaim(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").touch()
    claim.withdraw()
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    assert hold(tmp_path / "run") is not None


def test_a_lock_whose_file_was_removed_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    first = hold(tmp_path)
    (tmp_path / LOCK).unlink()
    second = hold(tmp_path)
    assert first is not None
    assert second is not None
    first.close()
    assert hold(tmp_path) is None


@pytest.mark.parametrize("run_dir", ["file", "file/run"])
def test_a_run_dir_that_cannot_be_a_folder_is_named(tmp_path: Path, run_dir: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used as a folder"):
        RunClaim(tmp_path / run_dir)
