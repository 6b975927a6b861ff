"""A terminal shows where a run is and keeps every line that is said; a log has the lines alone."""

import codecs
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest

from megalong.runtime import console, live, watchdog

ROOT = Path(__file__).parents[2]
MINI = ["+stage=65k", "+scale=mini", "train.steps=2", "model.num_hidden_layers=1", "data.eval_sequences=1"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is drawn at once."""
    monkeypatch.setattr(live, "EVERY_S", 0.01)
    monkeypatch.setattr(live, "PATIENCE_S", 0.0)


class Screen:
    """A terminal of 100 columns."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        termios.tcsetwinsize(slave, (40, 100))
        self.slave = os.fdopen(slave, "w", buffering=1)
        self.decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end inside a character
        self.written = ""

    def read(self) -> str:
        """Everything written so far."""
        while True:
            try:
                self.written += self.decoder.decode(os.read(self.master, 65536))
            except OSError:  # nothing more now, or closed
                return self.written

    def until(self, words: str) -> None:
        """Wait until something has been written."""
        deadline = time.monotonic() + 30
        while not re.search(words, self.read()):
            assert time.monotonic() < deadline, (words, self.written[-500:])
            time.sleep(0.01)

    def lines(self) -> list[str]:
        """What stands there in the end: a carriage return goes back to the beginning of the line."""
        found = []
        for line in self.read().replace("\r\n", "\n").split("\n"):
            shown = ""
            for text in line.split("\r"):
                shown = text + shown[len(text) :]
            found.append(shown.rstrip())
        return found


@contextmanager
def watched(first: bool = True) -> Iterator[Screen]:
    """A screen that this process writes to, as what runs under `launch.run`."""
    screen = Screen()
    with redirect_stdout(screen.slave), redirect_stderr(screen.slave), live.shown(first):
        yield screen
    with suppress(OSError):
        screen.slave.close()


def test_a_terminal_shows_phase_step_and_micro_batch_and_keeps_what_is_said(quick: None) -> None:
    with watched() as screen:
        watchdog.enter("loading weights")
        watchdog.part("tensor", 3, 9)
        screen.until(r"loading weights, tensor 3 of 9 0:00")
        console.say("canary: all is well")
        live.begin_stage("65k", 10, 30)
        watchdog.enter("training", 12)
        watchdog.enter("forward and backward")
        watchdog.part("micro-batch", 3, 4)
        screen.until(r"65k 11/30 \|.+\| step 12: forward and backward, micro-batch 3 of 4 0:00, ETA \d+:\d\d")
        watchdog.enter("optimizer")  # the bar does not go back
        screen.until(r"65k 11/30 \|.+\| step 12: optimizer 0:00, ETA")
        console.say("step 12/30 | loss {1}")
        watchdog.enter("saving")
        screen.until(r"65k 12/30 \|.+\| saving 0:00")
    assert [line for line in screen.lines() if line] == ["canary: all is well", "step 12/30 | loss {1}"]


def test_other_ranks_draw_nothing(quick: None) -> None:
    with watched(first=False) as screen:
        watchdog.enter("loading weights")
        time.sleep(0.1)
    assert screen.read() == ""


def test_a_log_hears_of_long_phases_alone_and_less_and_less_often(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(live, "SAID_AFTER_S", 0.1)
    with live.shown(first=True):
        for phase, step in (("verifying the checkpoint", None), ("forward and backward", 3)):
            watchdog.enter(phase, step)
            watchdog.part("file", 2, 5)
            time.sleep(1.0)
    said = capsys.readouterr().out.splitlines()
    assert set(said) <= {f"verifying the checkpoint, file 2 of 5: 0:0{n} so far" for n in range(2)}
    assert 1 <= len(said) <= 4


def test_a_closed_terminal_does_not_end_a_run(quick: None) -> None:
    with watched() as screen:
        watchdog.enter("loading weights")
        screen.until("loading weights")
        os.close(screen.master)
        time.sleep(0.05)
        console.warn("said to nobody")
        watchdog.enter("canary")
        time.sleep(0.05)


def test_the_trainer_says_the_same_lines_with_a_bar_and_without(tmp_path: Path) -> None:
    def command(name: str) -> list[str]:
        return [sys.executable, str(ROOT / "megalong/pretrain.py"), *MINI, f"run_dir={tmp_path / name}"]

    screen = Screen()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    shown = subprocess.Popen(command("a"), stdout=screen.slave, stderr=screen.slave, env=env)
    logged = subprocess.run(
        command("b"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=250
    )
    while shown.poll() is None:
        screen.read()
        time.sleep(0.05)
    assert (shown.returncode, logged.returncode) == (0, 0), logged.stdout
    assert "\r" not in logged.stdout

    def kinds(lines: list[str]) -> list[str]:
        """The lines without their numbers and paths, and without shares of a step's time, which may be none."""
        lines = [re.sub(r" s: [^|]*\|", " s |", line) for line in lines if line.strip()]
        return [re.sub(r"[\d.,:e+-]+|/\S+", "#", line) for line in lines]

    assert kinds(screen.lines()) == kinds(logged.stdout.splitlines())
    for phase in ("importing torch and megatron-core", r"65k [012]/2 \|"):
        assert re.search(phase, screen.read()), phase
