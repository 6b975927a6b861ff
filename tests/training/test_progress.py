"""A job restarted by a machine that gets nowhere ends with its own exit code; a person may start again."""

from pathlib import Path

import pytest

from megalong.runtime.errors import EXIT_NO_PROGRESS, NoProgressError, StopRequestedError
from megalong.training.progress import note_stop, require_progress


def requeued(restarts: int, job: str = "7") -> dict[str, str]:
    return {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}


def test_a_requeued_job_that_begins_where_it_began_before_is_ended(tmp_path: Path) -> None:
    require_progress(tmp_path, 0, {"SLURM_JOB_ID": "7"})
    with pytest.raises(NoProgressError, match="attempt 2 of job slurm 7 would begin at step 0") as caught:
        require_progress(tmp_path, 0, requeued(1))
    assert caught.value.exit_code == EXIT_NO_PROGRESS == 93


def test_progress_lets_it_go_on(tmp_path: Path) -> None:
    for restarts, step in enumerate((0, 10, 20)):
        require_progress(tmp_path, step, requeued(restarts))
    with pytest.raises(NoProgressError):
        require_progress(tmp_path, 20, requeued(3))


def test_another_job_and_a_person_may_begin_at_the_same_step(tmp_path: Path) -> None:
    require_progress(tmp_path, 5, requeued(0))
    require_progress(tmp_path, 5, requeued(0, job="8"))
    require_progress(tmp_path, 5, {})
    require_progress(tmp_path, 5, {})


def test_torchruns_own_restarts_count_as_well(tmp_path: Path) -> None:
    env = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    require_progress(tmp_path, 5, env)
    with pytest.raises(NoProgressError, match="torchrun a"):
        require_progress(tmp_path, 5, env | {"TORCHELASTIC_RESTART_COUNT": "1"})


def test_what_was_asked_to_stop_is_not_trained_on_by_torchrun(tmp_path: Path) -> None:
    env = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "0"}
    require_progress(tmp_path, 0, env)
    note_stop(tmp_path)
    with pytest.raises(StopRequestedError, match="has saved step 5: torchrun's restart 1 does not train on") as caught:
        require_progress(tmp_path, 5, env | {"TORCHELASTIC_RESTART_COUNT": "1"})
    assert caught.value.exit_code == 85
    require_progress(tmp_path, 5, env)  # by hand


def test_slurm_requeues_what_was_stopped_to_go_on_later(tmp_path: Path) -> None:
    require_progress(tmp_path, 0, requeued(0))
    note_stop(tmp_path)
    require_progress(tmp_path, 5, requeued(1))
