"""One `Run` for all ranks of a task, composed once: that takes longer than a step of a tiny model."""

from megalong.doctor.ranks import run_on_ranks

__all__ = ["run_on_ranks"]
