"""How much memory has a process held at most? Its own high-water mark, not one that it was born with."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_resident_bytes(pid: int | str = "self") -> int:
    """Highest resident size of a process so far, bytes; 0 for one that has ended.

    Not `getrusage`: its maximum outlives fork and exec, so the child of a large process would report its parent's.
    The kernel begins VmHWM anew with each address space. Where /proc does not tell it, `getrusage` has to do.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if pid == "self" else 0
