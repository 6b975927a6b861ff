"""Ranks lie on nodes so that what talks most stays inside, and a ring leaves a node once."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.cluster import ClusterConfig, Fact
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import ORDER, Layout
from megalong.topology.links import slowest, wire, wires
from megalong.topology.placement import Placement, block_order, cyclic_order, groups, outgoing, ring_edges

STAGES = ("65k", "262k", "524k", "1048k")


def fact(value: float) -> Fact:
    return Fact(value, "assumed", "test")


def cluster(nodes: int, per_node: int, **facts: float) -> ClusterConfig:
    settings = {"gpus_per_pair": 2, "nodes_per_leaf": 2, **facts}
    return ClusterConfig(
        nodes=fact(nodes), gpus_per_node=fact(per_node), **{name: fact(value) for name, value in settings.items()}
    )


def of_stage(name: str) -> Placement:
    run = run_of([f"+stage={name}", "cluster=l40s-64x8"])
    return Placement(run.layout, run.config.cluster)


@pytest.mark.parametrize("stage", STAGES)
def test_tensor_parallel_groups_never_leave_a_node(stage: str) -> None:
    placement = of_stage(stage)
    assert not any(placement.leaves_node(group) for group in groups(placement.layout, "tp"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_ring_leaves_each_of_its_nodes_at_most_once(stage: str) -> None:
    placement = of_stage(stage)
    for ring in groups(placement.layout, "cp"):
        leaving = outgoing(placement, ring_edges(ring))
        assert set(leaving.values()) <= {1}
        nodes = {placement.node(r) for r in ring}
        assert len(leaving) == (len(nodes) if len(nodes) > 1 else 0)


def test_head_exchange_that_matches_the_node_stays_inside_it() -> None:
    # two tensor-parallel ranks and four that trade heads fill a node of eight
    placement = Placement(Layout(tp=2, cp=32, dp=8), cluster(64, 8))
    inner = [ring[i : i + 4] for ring in groups(placement.layout, "cp") for i in range(0, 32, 4)]
    assert not any(placement.leaves_node(group) for group in inner)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 4),
    axes=st.sets(st.sampled_from(ORDER), min_size=1),
)
def test_groups_by_arithmetic_are_the_groups_of_the_layout(sizes, axes):
    layout = Layout(*sizes)
    assert sorted(groups(layout, *axes)) == sorted(layout.groups(*axes))


def test_edges_are_classed_by_what_they_cross() -> None:
    placement = Placement(Layout(dp=32), cluster(8, 4))
    assert [placement.edge(0, r) for r in (1, 2, 4, 8)] == ["pair", "node", "leaf", "spine"]


def test_dealing_ranks_out_makes_every_hop_leave_its_node() -> None:
    layout, machines = Layout(cp=8, dp=4), cluster(4, 8)
    block = Placement(layout, machines, block_order(32))
    dealt = Placement(layout, machines, cyclic_order(32, 8))
    hops = [edge for ring in groups(layout, "cp") for edge in ring_edges(ring)]
    assert sum(outgoing(block, hops).values()) == 0
    assert outgoing(dealt, hops) == Counter(dict.fromkeys(range(4), 8))


@given(nodes=st.integers(1, 8), per_node=st.integers(1, 8))
def test_every_order_uses_every_slot_once(nodes, per_node):
    assert sorted(cyclic_order(nodes * per_node, per_node)) == list(range(nodes * per_node))


def test_hops_that_leave_a_node_together_share_its_interfaces() -> None:
    machines = cluster(4, 8, nics_per_node=2, nic_gbs=10, spine_share=0.5)
    assert wire(machines, "leaf", leaving=2).bytes_per_second == 10e9
    assert wire(machines, "leaf", leaving=8).bytes_per_second == 2.5e9
    assert wire(machines, "spine", leaving=2).bytes_per_second == 5e9


def test_a_ring_is_as_fast_as_its_slowest_hop() -> None:
    machines = cluster(2, 4, node_gbs=20, pair_gbs=40, nic_gbs=5, nics_per_node=1)
    across = Placement(Layout(cp=8), machines)
    inside = Placement(Layout(cp=4, dp=2), machines)
    assert slowest(across, groups(across.layout, "cp")).bytes_per_second == 5e9
    assert slowest(inside, groups(inside.layout, "cp")).bytes_per_second == 20e9
    assert [w.edge for w in wires(across, groups(across.layout, "cp"))] == ["leaf", "node", "pair"]


def test_more_ranks_than_devices_are_refused() -> None:
    with pytest.raises(LayoutError, match="has 32"):
        Placement(Layout(cp=64), cluster(4, 8))
