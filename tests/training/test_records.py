"""A run's records never end it: what a full or read-only disk refuses is written later, whole and complete."""

import contextlib
import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.training.records import Appender, EventFile, JsonLines
from tests.training.disks import fill, make_read_only, small_disk


def fill_to_the_last_byte(disk: Path) -> Path:
    """A file that leaves nothing of a disk."""
    filler = fill(disk, leave_mebibytes=0)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")
    return filler


def points(folder: Path) -> list[tuple[int, float]]:
    """What TensorBoard itself reads of the curve `a/b`."""
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars("a/b")]


def test_nothing_is_missing_after_a_disk_was_full_to_the_last_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        lines, board = JsonLines(disk / "metrics.jsonl"), EventFile(disk / "tensorboard", 1)

        def step(number: int) -> None:
            lines.write({"step": number, "note": "x" * 3000})
            board.add_scalar("a/b", number / 2, number)
            board.flush()

        step(1)
        filler = fill_to_the_last_byte(disk)
        for number in (2, 3, 4):
            step(number)
        whole = [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()]
        assert whole == list(range(1, len(whole) + 1))  # what is there is whole
        assert len(whole) < 4
        assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1
        filler.unlink()
        step(5)
        lines.close()
        board.close()
        assert [json.loads(line)["step"] for line in (disk / "metrics.jsonl").read_text().splitlines()] == [
            1,
            2,
            3,
            4,
            5,
        ]
        assert points(disk / "tensorboard") == [(n, n / 2) for n in (1, 2, 3, 4, 5)]


def test_a_read_only_disk_is_one_warning_and_what_is_lost_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 4) as disk:
        make_read_only(disk)
        try:
            appender = Appender(disk / "log")
            for record in (b"a", b"b"):
                appender.add(record)
                assert not appender.flush()
            appender.close()
        finally:
            make_read_only(disk, False)
    said = capsys.readouterr().err
    assert said.count("Read-only file system") == 1
    assert "2 records of" in said


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


def test_a_resumed_run_purges_what_earlier_files_say_of_its_steps(tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 5)):
        board = EventFile(tmp_path, purge_step=first)
        for step in range(first, last + 1):
            board.add_scalar("a/b", 10 * first + step, step)
        board.close()
    assert points(tmp_path) == [(1, 11), (2, 12), (3, 33), (4, 34), (5, 35)]
