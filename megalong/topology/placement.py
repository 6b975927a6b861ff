"""Where each rank sits: node, pair of devices, leaf switch, and what lies between two ranks.

Ranks fill the cluster's slots in order: slot 0 is the first device of the first node. Slurm's block distribution
gives rank r slot r; other orders are given as a list. Consecutive slots of a node share a pair, consecutive nodes a
leaf switch. Pure integers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megalong.config.cluster import ClusterConfig
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import ORDER, Axis, Layout

EDGE_CLASSES = ("pair", "node", "leaf", "spine")
"""What a transfer crosses, from near to far: same pair of devices, same node, same leaf switch, the spine."""


@dataclass(frozen=True)
class Placement:
    """Slots of the ranks on a cluster.

    Raises:
        LayoutError: more ranks than the cluster has devices.
    """

    layout: Layout
    cluster: ClusterConfig
    slots: tuple[int, ...] | None = None
    """Slot of each rank; None: rank r in slot r."""

    def __post_init__(self) -> None:
        if self.layout.world_size > self.cluster.devices:
            raise LayoutError(
                f"The layout {self.layout} takes {self.layout.world_size} devices, and cluster {self.cluster.name} "
                f"has {self.cluster.devices}: choose another cluster=..., or a smaller layout."
            )

    @cached_property
    def gpus_per_node(self) -> int:
        return int(self.cluster.gpus_per_node.value)

    @property
    def nodes(self) -> int:
        """Nodes that hold at least one rank."""
        return len({self.node(r) for r in range(self.layout.world_size)})

    def slot(self, rank: int) -> int:
        """Index of the device of a rank, counted over all nodes."""
        return self.slots[rank] if self.slots else rank

    def node(self, rank: int) -> int:
        """Node of a rank."""
        return self.slot(rank) // self.gpus_per_node

    def edge(self, a: int, b: int) -> str:
        """Class of a transfer from rank a to rank b."""
        slot_a, slot_b = self.slot(a), self.slot(b)
        node_a, node_b = slot_a // self.gpus_per_node, slot_b // self.gpus_per_node
        if node_a == node_b:
            pair, first = int(self.cluster.gpus_per_pair.value), node_a * self.gpus_per_node
            return "pair" if (slot_a - first) // pair == (slot_b - first) // pair else "node"
        per_leaf = int(self.cluster.nodes_per_leaf.value)
        return "leaf" if node_a // per_leaf == node_b // per_leaf else "spine"

    def leaves_node(self, group: Sequence[int]) -> bool:
        """Whether the members of a group sit on more than one node."""
        return len({self.node(r) for r in group}) > 1


def block_order(world_size: int) -> tuple[int, ...]:
    """Slurm's --distribution=block: ranks fill one node after another."""
    return tuple(range(world_size))


def cyclic_order(world_size: int, gpus_per_node: int) -> tuple[int, ...]:
    """Slurm's --distribution=cyclic: neighbouring ranks go to different nodes, round robin. Bad for rings."""
    nodes = -(-world_size // gpus_per_node)
    return tuple(r % nodes * gpus_per_node + r // nodes for r in range(world_size))


def groups(layout: Layout, *axes: Axis) -> list[list[int]]:
    """All groups along `axes`, as `Layout.groups`, by arithmetic (fast enough to rank hundreds of layouts)."""
    inside = [range(0, layout.stride(a) * getattr(layout, a), layout.stride(a)) for a in ORDER if a in axes]
    outside = [range(0, layout.stride(a) * getattr(layout, a), layout.stride(a)) for a in ORDER if a not in axes]
    members = sorted(sum(steps) for steps in itertools.product(*inside))
    return [[base + m for m in members] for base in sorted(sum(s) for s in itertools.product(*outside))]


def ring_edges(ring: Sequence[int]) -> list[tuple[int, int]]:
    """(from, to) of every hop of a ring; none for a ring of one."""
    return list(zip(ring, [*ring[1:], ring[0]], strict=True)) if len(ring) > 1 else []


def outgoing(placement: Placement, edges: Sequence[tuple[int, int]]) -> Counter[int]:
    """Number of edges that leave each node."""
    return Counter(placement.node(a) for a, b in edges if placement.node(a) != placement.node(b))
