"""Sharding is a partition, its inverse is exact, and it is megatron-core's order."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.utils import get_batch_on_this_cp_rank

from megalong.attention import zigzag
from megalong.runtime.errors import LayoutError
from megalong.runtime.ranks import RankPool


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 9))
def test_the_ranks_hold_every_position_once(cp: int, chunk: int) -> None:
    positions = torch.cat([zigzag.local_positions(2 * cp * chunk, cp, r) for r in range(cp)])
    assert positions.sort().values.tolist() == list(range(2 * cp * chunk))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 2))
def test_unshard_inverts_shard_along_any_dimension(cp: int, chunk: int, dim: int) -> None:
    shape = [3, 2, 4]
    shape[dim] = 2 * cp * chunk
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    shards = [zigzag.shard(x, cp, r, dim) for r in range(cp)]
    assert torch.equal(zigzag.unshard(shards, dim), x)
    assert torch.equal(shards[-1].select(dim, 0), x.select(dim, zigzag.chunk_ranges(shape[dim], cp, cp - 1)[0][0]))


def megatrons_cut(length: int) -> list[int]:
    cut = get_batch_on_this_cp_rank({"tokens": torch.arange(length)[None]}, cp_group=dist.group.WORLD)
    return cut["tokens"][0].tolist()


def test_the_order_is_the_one_megatron_cuts_batches_in(ranks: RankPool) -> None:
    ours = [zigzag.local_positions(48, 4, r).tolist() for r in range(4)]
    assert ranks.run(megatrons_cut, 4, 48) == ours


@pytest.mark.parametrize(("length", "cp"), [(30, 4), (0, 1), (4, 4)])
def test_a_window_that_cannot_be_cut_is_refused_with_the_numbers(length: int, cp: int) -> None:
    with pytest.raises(LayoutError, match=str(2 * cp)):
        zigzag.chunk_ranges(length, cp, 0)
