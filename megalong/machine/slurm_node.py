"""What does Slurm think of a node? Reads `scontrol show node`, with a line per node (`--oneliner`) or with many."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class SlurmNode:
    """One node."""

    name: str
    state: str
    """As printed: IDLE, ALLOCATED, MIXED, IDLE+DRAIN, ..."""
    gpus: int
    """Configured (Gres); 0 where Slurm knows of none."""
    gpu_type: str | None
    """The name in slurm.conf, such as l40s."""
    cpus: int
    memory_gib: float
    """RealMemory of slurm.conf."""
    reason: str | None
    """Why it is drained or down."""

    @property
    def usable(self) -> bool:
        return not re.search(r"DOWN|DRAIN|FAIL|NOT_RESPONDING|\*", self.state)


def parse_nodes(text: str) -> list[SlurmNode]:
    """Read all nodes of an answer."""
    return [_node(block) for block in re.split(r"(?m)^(?=NodeName=)", text) if block.startswith("NodeName=")]


def _node(block: str) -> SlurmNode:
    def value(key: str) -> str:
        match = re.search(rf"(?:^|\s){key}=(\S*)", block)
        found = match[1] if match else ""
        return "" if found in ("(null)", "N/A") else found

    gpus, kind = 0, None
    for gres in re.sub(r"\([^)]*\)", "", value("Gres")).split(","):
        parts = gres.split(":")  # gpu:8, gpu:l40s:8
        if parts[0] == "gpu" and parts[-1].isdigit():
            gpus += int(parts[-1])
            kind = parts[1] if len(parts) > 2 else kind
    reason = re.search(r"(?:^|\s)Reason=(.+?)\s*(?:\[|$)", block, re.MULTILINE)
    return SlurmNode(
        name=value("NodeName"),
        state=value("State"),
        gpus=gpus,
        gpu_type=kind,
        cpus=int(value("CPUTot") or 0),
        memory_gib=int(value("RealMemory") or 0) / 1024,
        reason=reason[1] if reason else None,
    )
