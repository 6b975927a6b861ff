"""A job's end is judged by the first rank that ended, and a second crash at the same checkpoint is the last."""

from pathlib import Path

import pytest

from megalong.runtime.launch import master_address
from megalong.slurm.ending import judge, main
from megalong.slurm.start import Start, this_start


@pytest.mark.parametrize(
    ("code", "crashed_at", "job"),
    [
        (0, None, (0, False)),
        (2, None, (2, False)),
        (93, None, (93, False)),
        (85, None, (85, True)),
        (85, "step_00000010", (85, True)),  # it trained on, however often it crashes elsewhere
        (137, None, (137, True)),
        (1, "step_00000009", (1, True)),
        (1, "step_00000010", (93, False)),
        (1, "", (1, True)),
    ],
)
def test_what_a_code_means_for_the_job(code: int, crashed_at: str | None, job: tuple[int, bool]) -> None:
    ending = judge(code, "step_00000010", crashed_at)
    assert (ending.code, ending.again) == job


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def ending_of(run_dir: Path, code: int) -> str:
    arguments = [str(code), f"--first-end={run_dir / 'first-end'}", f"--run-dir={run_dir}", f"--notes={run_dir}"]
    assert main(arguments) == 0
    return (run_dir / "ending-1").read_text()


def test_the_first_end_counts_and_not_what_srun_says(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "first-end").write_text("2 5 n3\n")
    assert ending_of(run_dir, 143) == "end 2\n"
    said = f"job 7, start 1: rank 5 on n3 was the first to end with code 2, see {run_dir}/rank-5.log\n"
    assert capsys.readouterr().out == said


def test_ranks_that_could_note_nothing_leave_sruns_code(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ending_of(run_dir, 137) == "again 137\n"
    assert capsys.readouterr().out == "job 7, start 1: crashed with code 137, newest checkpoint: none\n"


def test_a_second_crash_ends_the_job_unless_a_checkpoint_came_between(run_dir: Path) -> None:
    assert ending_of(run_dir, 1) == "again 1\n"
    (run_dir / "checkpoints" / "latest").write_text("step_00000010\n")
    assert ending_of(run_dir, 1) == "again 1\n"
    assert ending_of(run_dir, 1) == "end 93\n"


def test_ranks_meet_at_one_port_whether_the_job_or_the_trainer_derives_it() -> None:
    env = {"SLURM_JOB_ID": "12345", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "n1"}
    start = this_start(env)
    assert start == Start(12345, 2)
    told = start.environment("10.0.0.1", "logs")
    assert master_address(told) == ("10.0.0.1", master_address(env)[1])
