"""Which wires does a ring cross, what does each have to carry, and is it fast enough to be hidden?"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.planning.ringtime import Pass
from megalong.planning.workload import Workload
from megalong.topology.links import Wire, wires
from megalong.topology.placement import Placement, groups


@dataclass(frozen=True)
class RingRow:
    """One class of hops of all rings, in one direction of one attention layer."""

    direction: str
    """forward or backward."""
    edge: str
    """pair, node, leaf or spine."""
    hops: int
    """Hops of this class over all rings."""
    bytes_per_hop: int
    needed_gbs: float
    """Bandwidth that hides a hop behind the step computed beside it, GB/s."""
    available_gbs: float
    hop_ms: float
    hidden_ms: float
    """Per hop, at this hop's own wire."""
    exposed_ms: float


def ring_map(work: Workload, placement: Placement, forward: Pass, backward: Pass) -> list[RingRow]:
    """Rows for the ring (the outer one of a2a+p2p), forward then backward, slowest wire first."""
    n = work.layout.cp // work.inner
    if n == 1:
        return []
    rings = [ring[i :: work.inner] for ring in groups(work.layout, "cp") for i in range(work.inner)]
    found = wires(placement, rings, reorder=work.cp_comm_type == "all_gather")
    return [
        _row(direction, one, wire, n)
        for direction, one in (("forward", forward), ("backward", backward))
        for wire in found
    ]


def _row(direction: str, one: Pass, wire: Wire, steps: int) -> RingRow:
    step, hop = one.compute / steps, wire.seconds(one.hop_bytes)
    return RingRow(
        direction=direction,
        edge=wire.edge,
        hops=wire.count,
        bytes_per_hop=one.hop_bytes,
        needed_gbs=one.hop_bytes / max(step - wire.latency_s, 1e-9) / 1e9,
        available_gbs=wire.bytes_per_second / 1e9,
        hop_ms=hop * 1e3,
        hidden_ms=min(hop, step) * 1e3,
        exposed_ms=max(0.0, hop - step) * 1e3,
    )
