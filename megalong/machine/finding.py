"""What is one thing that should be known of a machine, and where is the remedy written?"""

from __future__ import annotations

from dataclasses import dataclass

NCCL_GUIDE = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/troubleshooting.html"
NCCL_ENV = "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html"
KERNEL = "https://docs.kernel.org/admin-guide/kernel-parameters.html"
STOPS, SLOWS, NOTE = "stops", "slows", "note"


@dataclass(frozen=True)
class Finding:
    """One thing that should be known."""

    name: str
    weight: str
    """stops (runs hang, or are many times too slow), slows, or note."""
    what: str
    remedy: str
    source: str
