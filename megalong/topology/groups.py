"""Do the process groups that megatron-core makes equal the layout's? Makes them, then checks every one."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from megalong.topology.layout import Layout


def initialize(layout: Layout, hierarchical_sizes: list[int] | None = None) -> None:
    """Make megatron-core's process groups for a layout and check this rank's against it.

    Args:
        layout: its product is the world size.
        hierarchical_sizes: for a2a+p2p, [ranks exchanging heads, ranks in the ring].
    """
    assert layout.world_size == dist.get_world_size(), (layout, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        hierarchical_context_parallel_sizes=hierarchical_sizes,
        create_gloo_process_groups=dist.get_backend() == "nccl",  # on CPU the groups themselves are gloo
    )
    check(layout, dist.get_rank())


def check(layout: Layout, rank: int) -> None:
    """Assert that this rank's groups are where the layout says, member by member and in ring order."""
    expected = {
        "tensor": (layout.group(rank, "tp"), parallel_state.get_tensor_model_parallel_group()),
        "context": (layout.group(rank, "cp"), parallel_state.get_context_parallel_group()),
        "pipeline": (layout.group(rank, "pp"), parallel_state.get_pipeline_model_parallel_group()),
        "data": (layout.group(rank, "dp"), parallel_state.get_data_parallel_group()),
        "data and context": (
            layout.group(rank, "dp", "cp"),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        ),
    }
    for name, (ranks, group) in expected.items():
        found = dist.get_process_group_ranks(group)
        assert found == ranks, f"{name}-parallel group of rank {rank}: megatron has {found}, the layout {ranks}"
