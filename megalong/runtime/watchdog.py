"""Which rank ended the run, where and doing what? Every rank says that it lives; silence, a standstill or an
exception on one ends all of them with one message.

Each rank's thread writes a beat into the store where the ranks met (its own connection: the main thread may block in
another). Rank 0 listens to all, and all listen to rank 0; if the store itself is gone, so is whoever held it. Three
verdicts, see `judge`: a rank that is silent (dead, stopped, host gone), a rank that lives and stands still while the
others wait for it, and a rank that raised. The exit is `os._exit`: a thread blocked in a collective cannot be unwound.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megalong.runtime.errors import EXIT_CRASHED
from megalong.runtime.torchrun import last_words

COLLATERAL = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "socket", "broken pipe")
"""Words of errors that a rank gets because another one is gone."""


@dataclass
class Place:
    """What a rank is doing."""

    host: str
    step: int = 0
    """Optimizer step under way, counted from 1; 0 before the first."""
    phase: str = "starting"
    changes: int = 0
    """Places it has been in: all ranks go through the same ones, so fewer means behind."""
    part: str = ""
    """What of the phase: `micro-batch 3 of 16`."""
    share: float = 0.0
    """How much of the phase lies before that part, 0 to 1."""
    broken: str = ""
    """Error of a collective that failed on this rank, if any."""

    def __str__(self) -> str:
        where = f"step {self.step}" if self.step else "before the first step"
        return f"on host {self.host}, {where}, {self.phase}" + (f", {self.part}" if self.part else "")


@dataclass
class Heard:
    """What the listening rank knows of one rank."""

    place: Place
    silent_s: float
    """Seconds since its last beat."""
    still_s: float
    """Seconds since it last went from one place to the next."""


_here = Place(os.uname().nodename)


def enter(phase: str, step: int | None = None) -> None:
    """Say what this rank does from now on; costs nothing where no watchdog runs.

    Args:
        step: optimizer step, counted from 1; None: as before.
    """
    _here.phase, _here.changes = phase, _here.changes + 1
    _here.part, _here.share = "", 0.0
    if step is not None:
        _here.step = step


def part(what: str, number: int, count: int) -> None:
    """Say which of `count` equal parts of the phase this rank is at, counted from 1. That is no new place: ranks may
    differ in it."""
    _here.part, _here.share = f"{what} {number} of {count}", (number - 1) / count


def here() -> Place:
    """What this rank is doing, as it changes."""
    return _here


def judge(heard: Mapping[int, Heard], silent_after_s: float, still_after_s: float, beat_s: float) -> str | None:
    """Why the run cannot go on; None while it can.

    Args:
        heard: every rank.
        silent_after_s: silence after which a rank counts as lost; a few beats once a collective has failed somewhere.
        still_after_s: time without any progress anywhere after which the ranks that are behind are to blame.
        beat_s: seconds between two beats.
    """
    broken = {r: h for r, h in heard.items() if h.place.broken}
    patience = min(4 * beat_s, silent_after_s) if broken else silent_after_s
    silent = {r: h for r, h in heard.items() if h.silent_s > patience}
    if silent:
        named = "; ".join(f"rank {r} {h.place}" for r, h in sorted(silent.items()))
        seconds = max(h.silent_s for h in silent.values())
        return f"lost {named}. Nothing was heard of it for {seconds:.0f} s: it died, was stopped, or its host is gone."
    settled = bool(broken) and min(h.still_s for h in broken.values()) > 6 * beat_s  # nobody fell silent since
    if not settled and min(h.still_s for h in heard.values()) <= still_after_s:
        return None
    furthest = max(h.place.changes for h in heard.values())
    behind = {r: h for r, h in heard.items() if h.place.changes < furthest and r not in broken}
    named = "; ".join(f"rank {r} {h.place}" for r, h in sorted(behind.items())[:8])
    if settled:
        rank, first = next(iter(sorted(broken.items())))
        blame = (
            f"Behind the others: {named}." if behind else f"All live and are equally far: rank {rank} {first.place}."
        )
        return f"a collective failed on rank {', '.join(map(str, sorted(broken)))}: {first.place.broken} {blame}"
    seconds = min(h.still_s for h in heard.values())
    if behind:
        return f"no rank went on for {seconds:.0f} s. Waited for: {named}. It lives, but does not finish this."
    return f"no rank went on for {seconds:.0f} s; all are equally far: rank 0 {heard[min(heard)].place}."


class Watchdog:
    """Beats for this rank, listens, and ends the process when the run cannot go on.

    Args:
        store: a connection of its own to the store where the ranks met, with a timeout of about `silent_after_s`.
        silent_after_s: see `judge`.
        still_after_s: see `judge`; less than the timeout of collectives, so that the one waited for is named before
            those who wait give up.
    """

    def __init__(self, store: Any, rank: int, world_size: int, silent_after_s: float, still_after_s: float) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.silent_after_s, self.still_after_s = silent_after_s, still_after_s
        self.beat_s = min(2.0, max(0.1, silent_after_s / 6))
        self._beats = 0
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._going = threading.Lock()
        self._known: dict[int, tuple[int, float, int, float]] = {}  # beats, heard at, changes, changed at
        self._looked = time.monotonic()
        self._first: Place | None = None  # where rank 0 was last
        self._beat()
        self._rounds = 0
        self._thread = threading.Thread(target=self._live, name="watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_store, name="watchdog-guard", daemon=True)

    @property
    def started(self) -> bool:
        """Whether the ranks have come together and listen to one another."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Begin; all ranks have made their watchdogs by now."""
        self._thread.start()
        self._guard.start()

    def close(self) -> None:
        """The run is over; silence means nothing any more."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.beat_s + 1)

    def crashed(self, error: BaseException) -> None:
        """This rank raised: end the run with its name. An error that only says that another rank is gone waits for
        the verdict about that one. Does not return."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in COLLATERAL):
            _here.broken = text
            time.sleep(self.silent_after_s + 8 * self.beat_s)  # the thread ends the process on a verdict
        trace = "".join(traceback.format_exception(error))
        self.end(f"rank {self.rank} {_here} raised {text}", trace)

    def end(self, why: str, detail: str = "", code: int = EXIT_CRASHED, lost: bool = False) -> None:
        """Tell every rank to leave with `code`, print once, leave. Does not return.

        Args:
            lost: a rank is gone, or stands still, and will not hear of it.
        """
        self._speak(self._claim(why, code), why, detail)
        self._leave(code, beats=4 if lost else 20)

    def _speak(self, first: bool, why: str, detail: str = "") -> None:
        if first:
            print(f"\n{detail}megalong: {why}\n", file=sys.stderr, flush=True)
            last_words(f"megalong: {why}")

    def _beat(self) -> None:
        self._beats += 1
        with self._lock:
            self.store.set(f"beat/{self.rank}", json.dumps([self._beats, asdict(_here)]))

    def _live(self) -> None:
        while not self._done.wait(self.beat_s):
            try:
                self._beat()
                with self._lock:
                    code = int(self.store.get("verdict")) if self.store.check(["verdict"]) else None
                if code is not None:
                    self._leave(code)
                why = judge(self._listen(), self.silent_after_s, self.still_after_s, self.beat_s)
                self._rounds += 1
            except RuntimeError:  # torch's store errors are RuntimeErrors, and a broken connection stays broken
                if not self._done.is_set():
                    self._without_store()
                return
            if why is not None:
                self.end(why, lost=True)

    def _watch_store(self) -> None:
        """A store whose process is stopped never answers, and torch waits for it without end. Beats are counted and
        not seconds, so that a pause of this process is not held against the store."""
        seen, waited = -1, 0
        while not self._done.wait(self.beat_s):
            seen, waited = self._rounds, waited + 1 if self._rounds == seen else 0
            if waited * self.beat_s > self.silent_after_s:
                self._without_store()

    def _without_store(self) -> None:
        place = f" {self._first}" if self._first else ""
        why = f"lost rank 0{place}, or the process that held the store where the ranks met: it does not answer."
        self._speak(self.rank == 1, why)
        os._exit(EXIT_CRASHED)

    def _listen(self) -> dict[int, Heard]:
        """Rank 0 hears all; the others hear rank 0, which is not judged by itself."""
        ranks = range(self.world_size) if self.rank == 0 else range(1)
        with self._lock:
            values = self.store.multi_get([f"beat/{r}" for r in ranks])
        now = time.monotonic()
        slept = max(0.0, now - self._looked - 2 * self.beat_s)  # this process itself was stopped: nobody's fault
        self._looked = now
        heard = {}
        for rank, value in zip(ranks, values, strict=True):
            beats, place = json.loads(value)
            found = Place(**place)
            known = self._known.get(rank, (-1, now, -1, now))
            heard_at = now if beats != known[0] else known[1] + slept
            changed_at = now if found.changes != known[2] else known[3] + slept
            self._known[rank] = (beats, heard_at, found.changes, changed_at)
            heard[rank] = Heard(found, now - heard_at, now - changed_at)
        self._first = heard[0].place
        if self.rank != 0:  # a little patience: rank 0 speaks for all while it can
            heard[0].silent_s -= 3 * self.beat_s
            heard[0].still_s = 0.0
            heard[0].place.broken = ""
        return heard

    def _claim(self, why: str, code: int) -> bool:
        """Whether this rank is the one that speaks."""
        try:
            with self._lock:
                first = bool(self.store.add("spoken", 1) == 1)
                if first:
                    self.store.set("verdict", str(code))
        except RuntimeError:
            return self.rank == 0
        return first

    def _leave(self, code: int, beats: int = 4) -> None:
        """Exit; rank 0, in whose process the store may live, goes last, after at most so many beats."""
        if not self._going.acquire(blocking=False):
            threading.Event().wait()  # the other thread of this rank has heard of it too, and is counted
        try:
            with self._lock:
                self.store.add("gone", 1)
            until = time.monotonic() + beats * self.beat_s  # the others look once a beat, on a busy machine later
            while self.rank == 0 and time.monotonic() < until:
                with self._lock:
                    if self.store.add("gone", 0) >= self.world_size:
                        break
                time.sleep(self.beat_s / 4)
        except RuntimeError:
            pass
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
