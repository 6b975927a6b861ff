"""Every element of every parameter has one place, whoever owns it, in one bucket or in many."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.checkpoint.optimizer_shards import owner_of, shards_of
from megalong.runtime.ranks import RankPool


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 100), st.data())
def test_shards_cover_a_parameter_once_and_lie_within_their_ranks(
    ranks: int, width: int, offset: int, data: st.DataObject
) -> None:
    numel = ranks * width
    start = data.draw(st.integers(0, numel - 1))
    end = data.draw(st.integers(start + 1, numel))
    found = shards_of(offset + start, offset + end, offset, numel, ranks)
    assert found[0].start == 0
    assert found[-1].end == end - start
    assert all(a.end == b.start and a.rank < b.rank for a, b in pairwise(found))
    for shard in found:
        assert shard.rank * width <= start + shard.start < start + shard.end <= (shard.rank + 1) * width
    largest = max(p.end - p.start for p in found)
    assert next(p.rank for p in found if p.end - p.start == largest) == owner_of(found)


def collect_and_hand_out(run_dir: str, bucket_size: int | None) -> tuple[int, int, float]:
    """Buckets, elements owned, and the largest error after a way there and back."""
    import megalong.model.gpt as gpt
    from megalong.checkpoint import optimizer_shards as shards
    from megalong.checkpoint.load import make_moments
    from tests.training.runs import stage_run

    settings = gpt.DistributedDataParallelConfig

    def in_buckets(**changes: object) -> object:
        # megatron makes buckets where it overlaps their reduction with computing
        more = {"overlap_grad_reduce": True, "bucket_size": bucket_size} if bucket_size else {}
        return settings(**(changes | more))

    gpt.DistributedDataParallelConfig = in_buckets  # type: ignore[assignment,misc]
    try:
        stage = stage_run(run_dir, "topology.cp=2", "topology.dp=2")
    finally:
        gpt.DistributedDataParallelConfig = settings  # type: ignore[misc]
    make_moments(stage.state.optimizer)
    part = shards.part_of(stage.state.optimizer)
    rank = part.data_parallel_group.rank()
    before = {}
    for number, spread in enumerate(shards.spreads(part)):
        for key, tensor in shards._mine(part, spread, rank).items():
            shard = spread.of(rank)
            assert shard is not None
            # a value that says which element of which parameter this is
            values = torch.arange(shard.start, shard.end, dtype=torch.float64)
            tensor.copy_((number * 1e6 + shards.KEYS.index(key) * 1e5 + values % 1e5).float())
            before[number, key] = tensor.clone()
    whole = shards._collect(part)
    worst = 0.0
    for number, tensors in whole.items():
        for key, tensor in tensors.items():
            values = torch.arange(tensor.numel(), dtype=torch.float64) % 1e5
            expected = (number * 1e6 + shards.KEYS.index(key) * 1e5 + values).float()
            worst = max(worst, float((tensor - expected).abs().max()))
    for spread in shards.spreads(part):
        for tensor in shards._mine(part, spread, rank).values():
            tensor.zero_()
    owned = sum(t["param"].numel() for t in whole.values())
    shards._hand_out(part, whole)
    for number, spread in enumerate(shards.spreads(part)):
        for key, tensor in shards._mine(part, spread, rank).items():
            worst = max(worst, float((tensor - before[number, key]).abs().max()))
    return len(part.buffers[0].buckets), owned, worst


@pytest.mark.parametrize("bucket_size", [None, 200_000])
def test_the_way_to_whole_parameters_and_back(ranks: RankPool, tmp_path: Path, bucket_size: int | None) -> None:
    found = ranks.run(collect_and_hand_out, 4, str(tmp_path), bucket_size)
    assert all(worst == 0.0 for *_, worst in found)
    assert all((buckets > 1) == (bucket_size is not None) for buckets, *_ in found)
    owned = [n for _, n, _ in found]
    assert max(owned) < 0.8 * sum(owned)
