"""Which way do NCCL's messages take? Reads a log written with NCCL_DEBUG=INFO.

Every connection is a line `... NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/IPC` (`Ring 00 :` before NCCL 2.5), with
`[send]` or `[receive]` where it goes over the network. The word behind `via` names the transport
(src/transport/{p2p,shm,net}.cc in NVIDIA/nccl).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_CONNECTION = re.compile(
    r"NCCL INFO (?:Channel|Ring) (?P<channel>\d+)(?:/\d+)? : (?P<a>\d+)(?:\[\w+\])? -> (?P<b>\d+)(?:\[\w+\])?"
    r"(?: \[(?P<way>send|receive)\])? via (?P<via>\S+)"
)


@dataclass(frozen=True)
class NcclLog:
    """What a log tells."""

    version: str | None = None
    connections: dict[tuple[int, int], str] = field(default_factory=dict)
    """(sender, receiver) -> transport as printed: P2P/CUMEM/read, SHM/direct/direct, NET/IB/0/GDRDMA, ... Of several
    channels between two ranks, the slowest kind."""
    network: str | None = None
    """`Using network ...`: IB, Socket, a plugin's name."""
    settings: dict[str, str] = field(default_factory=dict)
    """NCCL_* that the log says were set by the environment."""
    gdr_disabled: tuple[str, ...] = ()
    """Interfaces that NCCL says it uses without GPUDirect RDMA."""
    warnings: tuple[str, ...] = ()
    """Texts of NCCL WARN lines, each once."""

    def kinds(self) -> dict[str, int]:
        """Kind of transport (see `kind`) -> number of connections."""
        found: dict[str, int] = {}
        for via in self.connections.values():
            found[kind(via)] = found.get(kind(via), 0) + 1
        return found


KINDS = ("P2P", "SHM", "NET/IB/GDRDMA", "NET/IB", "NET/Socket")
"""Fastest first, as far as one can say."""


def kind(via: str) -> str:
    """What sort of way a transport is: of `KINDS`, or its own first two words for a plugin's."""
    parts = via.split("/")
    if parts[0] in ("P2P", "SHM"):
        return parts[0]
    if parts[0] == "NET" and len(parts) > 1:
        if parts[1].startswith("IB"):  # IBext is the same through NVIDIA's plugin
            return "NET/IB/GDRDMA" if "GDRDMA" in parts else "NET/IB"
        return f"NET/{parts[1]}"
    return via


def parse_nccl(text: str) -> NcclLog:
    """Read a log; lines of several ranks may be mixed."""
    connections: dict[tuple[int, int], str] = {}
    settings: dict[str, str] = {}
    warnings: dict[str, None] = {}
    disabled: dict[str, None] = {}
    version = network = None
    for line in text.splitlines():
        if match := _CONNECTION.search(line):
            pair = (int(match["a"]), int(match["b"]))
            if pair not in connections or _rank(match["via"]) > _rank(connections[pair]):
                connections[pair] = match["via"]
        elif match := re.search(r"\bNCCL version ([\w.+]+)", line):
            version = match[1]
        elif match := re.search(r"NCCL INFO Using network (\S+)", line):
            network = match[1]
        elif match := re.search(r"NCCL INFO (NCCL_\w+) set by environment to (\S+?)\.?$", line):
            settings[match[1]] = match[2]
        elif match := re.search(r"GPU Direct RDMA Disabled for HCA \d+ '([^']+)'", line):
            disabled[match[1]] = None
        elif match := re.search(r"NCCL WARN (.+)", line):
            warnings[match[1].strip()] = None
    return NcclLog(version, connections, network, settings, tuple(disabled), tuple(warnings))


def _rank(via: str) -> int:
    return KINDS.index(kind(via)) if kind(via) in KINDS else len(KINDS)
