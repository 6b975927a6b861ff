"""Merging partial attentions is exact, at any magnitude of the scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.kernels import Reference
from megalong.attention.merge import accumulation_dtype, merge_


@settings(deadline=None)
@given(st.integers(0, 100), st.sampled_from([1.0, 1e2, 1e4]))
def test_two_halves_of_the_keys_merge_to_attention_over_all(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=generator, dtype=torch.float64) for h, n in ((4, 5), (2, 9), (2, 9)))
    kernel = Reference(scale)
    out, lse = kernel.forward(q, k[:, :, :3], v[:, :, :3], False)
    merge_(out, lse, *kernel.forward(q, k[:, :, 3:], v[:, :, 3:], False))
    whole_out, whole_lse = kernel.forward(q, k, v, False)
    # a log-sum-exp of size 10*scale is rounded to that many ulps, and weights are exponentials of its differences
    tolerance = max(1e-12, 10 * scale * torch.finfo(torch.float64).eps * 4)
    torch.testing.assert_close(out, whole_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gap", [0.0, 80.0, 1e4, 3e38])
def test_no_difference_of_log_sum_exp_overflows(gap: float) -> None:
    for sign in (-1, 1):
        out, lse = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1)
        merge_(out, lse, torch.full((1, 1, 1, 4), 3.0), torch.full((1, 1, 1), sign * gap))
        assert torch.isfinite(out).all()
        assert torch.isfinite(lse).all()
        assert out[0, 0, 0, 0].item() == (2.0 if gap == 0 else 3.0 if sign > 0 else 1.0)


def test_low_precision_parts_are_merged_in_fp32() -> None:
    out, lse = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1)
    merge_(out, lse, torch.full((1, 1, 1, 4), 1 + 2**-7, dtype=torch.bfloat16), torch.full((1, 1, 1), -3.0))
    assert out.dtype == torch.float32
    expected = 1 + torch.sigmoid(torch.tensor(-3.0)).item() * 2**-7  # lost if the sum were rounded to bf16
    assert out[0, 0, 0, 0].item() == pytest.approx(expected, rel=1e-7)


def test_accumulators_are_never_narrower_than_fp32() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    assert [accumulation_dtype(d) for d in dtypes] == [torch.float32] * 3 + [torch.float64]
