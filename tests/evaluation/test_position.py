"""Loss by position is the mean over valid tokens, however the tokens are spread over ranks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.zigzag import local_positions, shard
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums, paired


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


def test_sequences_kept_apart_give_the_same_means_and_their_spread():
    generator = torch.Generator().manual_seed(3)
    losses, edges = torch.rand(5, 32, generator=generator), bucket_edges(32, 8)
    mask = torch.ones(5, 32)
    mask[0, :4] = 0
    each = [bucket_sums(losses[i : i + 1], mask[i : i + 1], torch.arange(32), edges) for i in range(5)]
    apart, together = (LossByPosition.from_sums(s, edges) for s in (torch.stack(each), torch.stack(each).sum(0)))
    assert (apart.loss, apart.last_quarter, together.spread) == (together.loss, together.last_quarter, [])
    means = losses[:, 12:16].mean(1)
    assert apart.spread[3] == pytest.approx(float(means.std() / math.sqrt(5)))
    assert apart.spread[0] == pytest.approx(float(losses[1:, :4].mean(1).std() / 2))
    assert apart.sequences == pytest.approx(losses[:, 24:].mean(1).tolist())


def test_a_change_is_told_by_pairs_of_sequences():
    """Sequences differ by far more than training changes each of them."""
    level, change = torch.arange(8.0)[:, None], torch.tensor([-0.3, -0.5] * 4)[:, None]
    edges, ones = bucket_edges(16, 4), torch.ones(1, 16)
    curves = [
        LossByPosition.from_sums(
            torch.stack([bucket_sums(row.expand(1, 16), ones, torch.arange(16), edges) for row in rows]), edges
        )
        for rows in (level, level + change)
    ]
    mean, error = paired(*curves)
    assert (mean, error) == (pytest.approx(-0.4, abs=1e-6), pytest.approx(0.1 * math.sqrt(8 / 7 / 8), rel=1e-4))
    assert curves[0].spread[3] > 0.8
    assert paired(curves[0], LossByPosition(edges, [1.0] * 4, 1.0)) is None
