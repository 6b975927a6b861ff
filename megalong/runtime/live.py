"""What is the run doing right now? One line at the foot of the terminal, drawn by a thread twice a second.

It is drawn from the place that every rank keeps for the watchdog (`watchdog.enter`), so a step pays nothing for it, and
it moves while the main thread is inside torch. Where there is no terminal nothing is drawn; there, whatever is not a
training step and takes long is said after 1, 2, 4, ... minutes, so that a log shows that it lives.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from megalong.runtime import console, watchdog

EVERY_S = 0.5
PATIENCE_S = 1.0
"""What is over before is not drawn."""
SAID_AFTER_S = 60.0
IN_STEP = ("training", "reading data", "forward and backward", "optimizer")
"""Phases of a training step."""


@dataclass(frozen=True)
class Stage:
    """What the bar counts."""

    name: str
    done: int
    """Steps done when it began."""
    steps: int
    began: float
    """`time.monotonic()`."""


_stage: Stage | None = None


def begin_stage(name: str, done: int, steps: int) -> None:
    """From now on steps are counted, `done` of `steps` at first."""
    global _stage
    _stage = Stage(name, done, steps, time.monotonic())


@contextmanager
def shown(first: bool) -> Iterator[None]:
    """Show what this process does while the block runs, if it is the first rank."""
    global _stage
    if not first:
        yield
        return
    line = Line(next((s for s in (sys.stderr, sys.stdout) if _is_terminal(s)), None))
    line.start()
    try:
        yield
    finally:
        line.stop()
        _stage = None


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


class Line:
    """Draws, or says.

    Args:
        terminal: None: there is none.
    """

    def __init__(self, terminal: TextIO | None) -> None:
        self.terminal = terminal
        self._bar: Any = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)
        self._doing: tuple[str, int] = ("", 0)
        self._since = self._began = time.monotonic()
        self._said_s = SAID_AFTER_S
        self._furthest = 0.0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Take the line away."""
        self._done.set()
        self._thread.join(timeout=5.0)  # it may be writing to somebody who does not read
        if self._bar is not None:
            console.write_aside(nullcontext)
            self._bar.close()

    def _run(self) -> None:
        while not self._done.wait(EVERY_S):
            now = time.monotonic()
            place = watchdog.here()
            in_step = place.phase in IN_STEP
            doing = ("step", place.step) if in_step else (place.phase, place.step)
            if doing != self._doing:
                self._doing, self._since, self._said_s = doing, now, SAID_AFTER_S
            if self.terminal is not None:
                self._draw(place, now)
            elif not in_step and now - self._since >= self._said_s:
                console.say(f"{words(place)}: {clock(now - self._since)} so far")
                self._said_s *= 2

    def _draw(self, place: watchdog.Place, now: float) -> None:
        if now - self._began < PATIENCE_S:
            return
        here = f"{words(place)} {clock(now - self._since)}"
        stage, total, done, text = _stage, None, 0.0, here
        if stage is not None:
            total = stage.steps
            reached = place.step - 1 + place.share if place.phase in IN_STEP else place.step
            done = self._furthest = min(total, max(stage.done, reached, self._furthest))
            left = (now - stage.began) / (done - stage.done) * (total - done) if done > stage.done else None
            eta = "" if left is None else f", ETA {clock(left)}"
            text = f"{stage.name} {int(done)}/{total} |{{bar}}| " + _literal(f"{here}{eta}")
        else:
            text = _literal(text)
        if self._bar is None:
            from tqdm import tqdm

            tqdm.monitor_interval = 0  # this thread draws; tqdm need not start one of its own
            console.write_aside(tqdm.external_write_mode)  # before the line is there: nothing may be said over it
            self._bar = tqdm(
                total=total, initial=done, file=self.terminal, leave=False, dynamic_ncols=True, bar_format=text
            )
            return
        self._bar.total, self._bar.n, self._bar.bar_format = total, done, text
        self._bar.refresh()


def words(place: watchdog.Place) -> str:
    """Where a run is, in short: step, phase and what of it."""
    what = f"{place.phase}, {place.part}" if place.part else place.phase
    return f"step {place.step}: {what}" if place.phase in IN_STEP and place.step else what


def _literal(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss` or `m:ss`."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
