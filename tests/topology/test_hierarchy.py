"""The groups of a2a+p2p that megatron makes on 512 ranks: heads stay inside a node, the ring goes from node to node."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalong.recipe.resolve import run_of
from megalong.topology import groups
from megalong.topology.layout import Layout
from megalong.topology.placement import Placement

LAYOUT, SIZES = Layout(tp=2, cp=32, dp=8), [4, 8]


@pytest.mark.parametrize("rank", [0, 77, 511])
def test_head_exchange_stays_in_the_node_and_the_outer_ring_visits_each_once(rank: int, torch_on_cpu: None) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=LAYOUT.world_size)
    groups.initialize(LAYOUT, SIZES)
    inner, outer = (dist.get_process_group_ranks(g) for g in parallel_state.get_hierarchical_context_parallel_groups())
    ring = LAYOUT.group(rank, "cp")
    at = ring.index(rank)
    assert inner == ring[at // 4 * 4 : at // 4 * 4 + 4]
    assert outer == ring[at % 4 :: 4]
    placement = Placement(LAYOUT, run_of(["+stage=1048k"]).config.cluster)
    assert not placement.leaves_node(inner)
    assert len({placement.node(r) for r in outer}) == len(outer) == 8
