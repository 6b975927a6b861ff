"""What does a part of the doctor get, and what does it say of itself?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megalong.doctor.ranks import Ranks
from megalong.doctor.result import Check
from megalong.machine.finding import Finding
from megalong.machine.inventory import Inventory
from megalong.machine.nccl_log import NcclLog

MINI = ["+stage=65k", "+scale=mini"]
"""The recipe's first stage on a small model: what parts run that ask whether something is right, not how fast."""
CPU_RANKS = 4


@dataclass
class Round:
    """One visit of the doctor: what parts share."""

    machine: Inventory
    ranks: Ranks
    out: Path
    """Folder for report, cluster file and logs."""
    name: str
    """Of the cluster file."""
    settings: list[str] = field(default_factory=list)
    """What the user set of the run whose shapes are measured: `+stage=1048k`, `topology.cp=8`, ..."""
    log: NcclLog | None = None
    """What NCCL wrote, once a part has let it."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.ranks.device == "cuda"

    @property
    def cluster_file(self) -> Path:
        return self.out / "cluster" / f"{self.name}.yaml"

    @property
    def mini(self) -> list[str]:
        """Settings of a small run here."""
        return [*MINI, "cluster=auto"] if self.on_gpu else list(MINI)


@dataclass(frozen=True)
class Part:
    """One part."""

    name: str
    question: str
    run: Callable[[Round], list[Check]]
    on_gpu: tuple[str, ...] = ()
    """What it does besides where there is a GPU."""
