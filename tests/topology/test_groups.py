"""megatron-core's groups equal the layout's, for real ranks and for all ranks of the full-size stages."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from megalong.topology import groups
from megalong.topology.layout import Layout


@pytest.mark.parametrize("stage", ["65k", "262k", "524k", "1048k"])
def test_every_ring_of_a_full_stage_is_where_the_layout_says(stage: str, torch_on_cpu: None) -> None:
    layout = run_of([f"+stage={stage}"]).layout
    for ring in layout.rings():
        for rank in (ring[0], ring[-1]):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
            groups.initialize(layout)
            assert dist.get_process_group_ranks(parallel_state.get_context_parallel_group()) == ring
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def initialize(layout: Layout) -> list[int]:
    groups.initialize(layout)
    return dist.get_process_group_ranks(parallel_state.get_context_parallel_group())


@pytest.mark.parametrize("layout", [Layout(tp=2, cp=2), Layout(cp=2, dp=2), Layout(pp=2, cp=2), Layout(cp=4)], ids=str)
def test_real_ranks_find_themselves_in_the_layouts_groups(ranks: RankPool, layout: Layout) -> None:
    assert ranks.run(initialize, 4, layout) == [layout.group(r, "cp") for r in range(4)]


def test_a_group_in_another_order_is_noticed(torch_on_cpu: None) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    groups.initialize(Layout(tp=2, cp=4))
    with pytest.raises(AssertionError, match="parallel group of rank 1"):
        groups.check(Layout(tp=4, cp=2), 1)
