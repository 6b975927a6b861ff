"""What came of one claim, and of one part of the doctor's round."""

from __future__ import annotations

from dataclasses import dataclass, field

PASS, FAIL, NOT_RUN, NOTE = "pass", "fail", "not run", "note"


@dataclass(frozen=True)
class Check:
    """One claim."""

    name: str
    state: str
    """pass, fail, not run (the machine does not allow it) or note (a figure without a limit)."""
    figure: str
    """What was seen, with units; or why it was not run."""
    limit: str = ""
    """What it was held against."""


def held(name: str, good: bool, figure: str, limit: str) -> Check:
    """A claim that passes or fails."""
    return Check(name, PASS if good else FAIL, figure, limit)


@dataclass
class PartResult:
    """One part."""

    name: str
    question: str
    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""
    """Why the part itself broke; empty where it did not."""

    @property
    def state(self) -> str:
        states = {check.state for check in self.checks}
        if self.error or FAIL in states:
            return FAIL
        return PASS if PASS in states else NOTE if NOTE in states else NOT_RUN
