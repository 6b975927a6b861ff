"""The rate of a ring whose hops cross different wires, while all rings of the cluster move.

A hop inside a node has the rate of its wire. Hops that leave a node share its network interfaces: one hop uses at most
one interface. A ring moves as fast as its slowest hop, because every block of data passes every hop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megalong.config.cluster import ClusterConfig
from megalong.topology.placement import EDGE_CLASSES, Placement, outgoing, ring_edges


@dataclass(frozen=True)
class Wire:
    """What one hop has to itself."""

    edge: str
    """Class of the hop: pair, node, leaf, spine; self where nothing moves."""
    bytes_per_second: float
    latency_s: float
    count: int = 0
    """Hops of this class in all rings together."""

    def seconds(self, size: float, messages: int = 1) -> float:
        """Time of `size` bytes sent as `messages` messages, one after another."""
        return size / self.bytes_per_second + messages * self.latency_s if size else 0.0


NOTHING = Wire("self", float("inf"), 0.0)


def wire(cluster: ClusterConfig, edge: str, leaving: int = 1, exchange: bool = False) -> Wire:
    """Rate of one hop.

    Args:
        edge: class of the hop.
        leaving: hops that leave the same node at the same time.
        exchange: its two ends send to each other at the same time.
    """
    if edge in ("pair", "node"):
        share = cluster.exchange_share.value if exchange else 1.0
        rate = cluster.pair_gbs.value if edge == "pair" else cluster.node_gbs.value
        return Wire(edge, rate * share * 1e9, cluster.node_latency_us.value * 1e-6)
    share = cluster.network_exchange_share.value if exchange else 1.0
    # what one connection carries, and what a node's interfaces leave to each: whichever is less
    rate = cluster.nic_gbs.value * min(share, cluster.nics_per_node.value / max(1, leaving))
    if edge == "spine":
        rate *= cluster.spine_share.value
    return Wire(edge, rate * 1e9, cluster.network_latency_us.value * 1e-6)


def wires(
    placement: Placement, rings: Sequence[Sequence[int]], reorder: bool = False, exchange: bool = False
) -> list[Wire]:
    """One wire per class of hop that occurs, slowest first; empty when nothing moves.

    Args:
        rings: groups in ring order, all moving at once.
        reorder: the communication library may choose the order inside a group (collectives), so it goes node by node.
        exchange: every two neighbours send to each other at the same time; in a ring of two they always do.
    """
    if reorder:
        rings = [sorted(ring, key=placement.slot) for ring in rings]
    edges = [edge for ring in rings for edge in ring_edges(ring)]
    counts = Counter(placement.edge(a, b) for a, b in edges)
    leaving = max(outgoing(placement, edges).values(), default=1)
    mutual = exchange or all(len(ring) == 2 for ring in rings)
    found = []
    for edge in EDGE_CLASSES:
        if counts[edge]:
            found.append(replace(wire(placement.cluster, edge, leaving, mutual), count=counts[edge]))
    return sorted(found, key=lambda w: w.bytes_per_second)


def slowest(
    placement: Placement, rings: Sequence[Sequence[int]], reorder: bool = False, exchange: bool = False
) -> Wire:
    """The wire that sets the pace of all rings."""
    return next(iter(wires(placement, rings, reorder, exchange)), NOTHING)
