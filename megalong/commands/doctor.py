"""Is this machine fit for megalong, and what can it do? The parts of `megalong.doctor` as a command."""

from __future__ import annotations

import sys

from megalong.doctor.command import app


def command() -> int:
    """`megalong-doctor`; exit code."""
    return app(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
