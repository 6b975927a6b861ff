"""Has anybody asked this run to stop? SIGUSR1 or SIGTERM on any rank ends the step on every rank."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopRequest:
    """Notes signals from now on; ranks agree once a step (`agreement`), so that all stop after the same one."""

    def __init__(self) -> None:
        self._name: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._name = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self._name is not None
