"""The lower bound of theta is the published one, and a theta that is too small is told with its numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.rope.bound import bound_warning, critical_wavelength, first_negative, lower_bound, plain_frequencies
from megalong.rope.theta import RotaryPoint, scaling_law
from megalong.runtime.errors import ThetaError

BASE = RotaryPoint(500_000, 8192)
# To three digits, by this definition. Published, to two digits, head_dim 128: Men et al. (arXiv 2405.14591, table 2)
# 2.1e6, 3.6e7, 6.4e7, 5.1e8 from a coarser list of bases; Su (kexue.fm/archives/10122) 2.1e6, 2.4e7, 5.8e7, 6.5e7 from
# a finer one. Every base of theirs that is below ours lies between two numbers of three digits.
BOUNDS = {65_536: 2.10e6, 262_144: 3.28e7, 524_288: 6.42e7, 1_048_576: 3.47e8}
SHORT = {1024: 4.3e3, 2048: 1.2e4, 8192: 8.4e4}  # Su's, where his list and ours agree


def smallest_sum(theta: float, head_dim: int, window: int) -> float:
    """min of sum_i cos(m theta_i), term by term."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    total = np.zeros(window)
    for f in frequency:
        total += np.cos(np.arange(window) * f)
    return float(total.min())


@pytest.mark.parametrize("window", BOUNDS)
def test_the_known_bases_to_three_digits_hold_and_the_number_below_does_not(window):
    base = BOUNDS[window]
    step = 10.0 ** (int(np.log10(base)) - 2)
    assert first_negative(plain_frequencies(base, 128), window) is None
    assert first_negative(plain_frequencies(base - step, 128), window) is not None
    if window == min(BOUNDS):
        assert smallest_sum(base, 128, window) >= 0 > smallest_sum(base - step, 128, window)


@pytest.mark.parametrize("window", [1024, 2048, 8192])
def test_the_search_finds_the_published_bound(window):
    assert float(f"{lower_bound(window, 128):.1e}") == SHORT[window]


def test_every_theta_of_the_cards_passes_and_plain_ntk_from_the_base_does_not():
    for theta, window in (
        (15296098, 65_536),
        (207112184, 262_144),
        (1062356830, 524_288),
        (2804339833, 1_048_576),
        (3580165449, 1_048_576),
        (45218125209, 4_194_304),
    ):
        assert first_negative(plain_frequencies(theta, 128), window) is None
    assert first_negative(plain_frequencies(500_000 * 8 ** (128 / 126), 128), 65_536) is not None


@settings(max_examples=30, deadline=None)
@given(
    theta=st.floats(1e2, 1e7), head_dim=st.sampled_from([16, 64, 128]), window=st.integers(1, 6000), seed=st.integers()
)
def test_the_first_negative_distance_is_the_one_found_term_by_term(theta, head_dim, window, seed):
    found = first_negative(plain_frequencies(theta, head_dim), window)
    assert (found is None) == (smallest_sum(theta, head_dim, window) >= 0)
    if found is not None:
        assert smallest_sum(theta, head_dim, found + 1) < 0
        assert found == 0 or smallest_sum(theta, head_dim, found) >= 0


def test_a_theta_below_the_bound_is_told_with_the_numbers():
    said = bound_warning(10_000, 8192, 128)
    assert said is not None
    assert "theta 10,000 and head_dim 128" in said
    assert "window of 8,192" in said
    assert "lower bound for this window is 83,800" in said
    assert bound_warning(83_800, 8192, 128) is None
    assert "although theta is above the lower bound of 4,300" in (bound_warning(6_010, 1024, 128) or "")


def test_a_scaling_is_judged_by_its_own_frequencies():
    interpolated = plain_frequencies(500_000, 128) / 8
    assert bound_warning(500_000, 65_536, 128, interpolated) is None
    assert "with its rope scaling" in (bound_warning(1e9, 8192, 128, plain_frequencies(10_000, 128)) or "")


def test_the_scaling_law_turns_the_critical_dimension_once_in_the_window():
    assert critical_wavelength(BASE, BASE.theta) == pytest.approx(8192)
    for window in (262_144, 1_048_576, 4_194_304):
        assert critical_wavelength(BASE, scaling_law(BASE, window)) == pytest.approx(window, rel=1e-3)


def test_what_has_no_bound_is_refused():
    with pytest.raises(ThetaError, match="even head dimension"):
        lower_bound(1024, 127)
    with pytest.raises(ThetaError, match="no rotary base"):
        lower_bound(1024, 2)
