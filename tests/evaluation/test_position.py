"""Loss by position is the mean over valid tokens, however the tokens are spread over ranks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.zigzag import local_positions, shard
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums


@settings(max_examples=40, deadline=None)
@given(cp=st.sampled_from([1, 2, 4]), buckets=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_shards_added_together_give_the_loss_of_the_whole_sequence(cp, buckets, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(3, 48, generator=generator)
    mask = (torch.rand(3, 48, generator=generator) < 0.7).float()
    edges = bucket_edges(48, buckets)
    total = sum(
        bucket_sums(shard(losses, cp, r, 1), shard(mask, cp, r, 1), local_positions(48, cp, r), edges)
        for r in range(cp)
    )
    result = LossByPosition.from_sums(torch.as_tensor(total), edges)
    for loss, a, b in zip(result.loss, edges, edges[1:], strict=False):
        valid = losses[:, a:b][mask[:, a:b] > 0]
        assert loss == (pytest.approx(float(valid.mean())) if len(valid) else None)


@given(seq_length=st.integers(1, 5000), buckets=st.integers(1, 64))
def test_buckets_are_contiguous_whole_and_equal_to_one_token(seq_length, buckets):
    edges = bucket_edges(seq_length, buckets)
    sizes = [b - a for a, b in pairwise(edges)]
    assert (edges[0], edges[-1]) == (0, seq_length)
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1


def test_the_last_quarter_weighs_tokens_and_not_buckets_and_masked_nan_does_not_count():
    losses = torch.arange(16.0)[None]
    mask = torch.ones(1, 16)
    losses[0, 13], mask[0, 13] = math.nan, 0
    result = LossByPosition.from_sums(
        bucket_sums(losses, mask, torch.arange(16), bucket_edges(16, 8)), [*range(0, 17, 2)]
    )
    assert result.last_quarter == pytest.approx((12 + 14 + 15) / 3)


def test_a_window_without_valid_tokens_has_no_loss_rather_than_nan():
    result = LossByPosition.from_sums(torch.zeros(2, 4, dtype=torch.float64), [0, 1, 2, 3, 4])
    assert result.loss == [None] * 4
    assert result.last_quarter is None
