"""Has anybody asked this run to stop? SIGUSR1, SIGTERM, SIGHUP or Ctrl-C on any rank ends the step on every rank.

A signal is noted by a thread and not by Python's handlers, which wait until the main thread leaves torch: a step of a
million tokens may stay there for minutes. So the answer to the first Ctrl-C comes at once, and the second one ends the
process whatever it is doing.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from megalong.runtime import console
from megalong.runtime.errors import EXIT_INTERRUPTED, EXIT_OK

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TORCHRUN_PATIENCE_S = 30.0
"""Seconds between torchrun's own signal and its SIGKILL (torch/distributed/run.py, --shutdown-timeout)."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_current: StopRequest | None = None
_listening = False


class StopRequest:
    """Notes signals from now on; ranks agree once a step (`agreement`), so that all stop after the same one.

    What was ignored when the process began (`nohup`, `command &` in a script) stays ignored.
    """

    def __init__(self) -> None:
        global _current
        self._name: str | None = None
        self.leave: Callable[[], None] | None = None
        """Set until the ranks have met, where torchrun is: done at its SIGTERM, and the process ends. torchrun sends it
        because another rank has failed, which this one would otherwise wait for until torchrun kills it."""
        _current = self
        _listen()
        for number in SIGNALS:
            if number not in (signal.SIGINT, signal.SIGHUP) or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)

    @property
    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._name is not None

    def note(self, number: int) -> None:
        """A signal came; a Ctrl-C after another one ends the process."""
        if number == signal.SIGTERM and self.leave is not None:
            self.leave()
            os._exit(EXIT_OK)  # nothing has begun; what ends well torchrun does not list beside the rank that failed
        name = signal.Signals(number).name
        # torchrun answers its own second Ctrl-C with a SIGTERM to its ranks
        if self.asked and (number == signal.SIGINT or (self._name, name) == ("SIGINT", "SIGTERM")):
            console.shout("\nmegalong: Ctrl-C again: left at once; what was not saved is lost")
            os._exit(EXIT_INTERRUPTED)
        if not self.asked:
            console.shout(
                f"\nmegalong: {name}: the run ends, and is saved, as soon as the step under way is done"
                + (" (Ctrl-C again: leave at once)" if number == signal.SIGINT else "")
            )
        self._name = name


def _listen() -> None:
    """Start the thread that hears of signals at once: C code writes their numbers into a pipe."""
    global _listening
    if _listening:
        return
    _listening = True
    here, there = os.pipe()
    os.set_blocking(there, False)
    signal.set_wakeup_fd(there, warn_on_full_buffer=False)

    def hear() -> None:
        while True:
            for number in os.read(here, 64):
                if number in SIGNALS and _current is not None:
                    _current.note(number)

    threading.Thread(target=hear, name="signals", daemon=True).start()


def follow_torchrun() -> None:
    """Ask the kernel for a SIGINT when torchrun goes: after a second Ctrl-C, or when it is killed, it leaves its ranks
    behind, each in a session of its own, and they would hold their GPUs without end. Linux alone has this."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGINT), 0, 0, 0)


def torchrun_patience_s(env: Mapping[str, str], parent: list[str]) -> float:
    """Seconds that torchrun leaves its ranks to save before it kills them.

    Args:
        env: of the process.
        parent: torchrun's command line.
    """
    given: str | None = env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    for i, word in enumerate(parent):
        name, _, value = word.partition("=")
        if name in ("--shutdown-timeout", "--shutdown_timeout"):
            given = value or "".join(parent[i + 1 : i + 2])
    try:
        return float(given) if given is not None else TORCHRUN_PATIENCE_S
    except ValueError:
        return TORCHRUN_PATIENCE_S


def parents_command() -> list[str]:
    """The command line of the process that started this one; empty where it cannot be read."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def too_impatient(step_s: float, save_s: float, patience_s: float) -> str | None:
    """What to know before starting under torchrun, if a stop would not leave the time to save; else None.

    Args:
        step_s, save_s: planned seconds of a step and of a checkpoint.
        patience_s: see `torchrun_patience_s`.
    """
    needed = 1.5 * step_s + 2 * save_s
    if needed <= patience_s:
        return None
    return (
        f"torchrun kills its ranks {patience_s:.0f} s after Ctrl-C or SIGTERM, and to finish a step and save it takes "
        f"up to {needed:,.0f} s here: start it with --shutdown-timeout={int(needed) + 1}, or use slurm/stage.sbatch, "
        "which waits. A run that is killed loses the steps since its last checkpoint."
    )
