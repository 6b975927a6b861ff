"""The theta laws give the published bases, and a stage that does not follow is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.rope.theta import RotaryPoint, check_follows, dynamic_ntk, scaling_law, stage_theta
from megalong.runtime.errors import ThetaError

BASE = RotaryPoint(500_000, 8192)


def test_chained_dynamic_ntk_gives_the_cards_thetas():
    point, found = BASE, []
    for window, factor in ((65_536, 4.0), (262_144, 4.0), (524_288, 4.0), (1_048_576, 1.6)):
        point = RotaryPoint(dynamic_ntk(point, window, head_dim=128, factor=factor), window)
        found.append(point.theta)
    assert found == [15296098, 207112184, 1062356830, 2804339833]


def test_scaling_law_gives_the_later_cards_thetas():
    assert scaling_law(BASE, 262_144) == 283461213
    assert scaling_law(BASE, 1_048_576) == 3580165449
    assert scaling_law(BASE, 4_194_304) == 45218125209  # 45.2B on the Llama-3-8B-Instruct-Gradient-4194k card


@settings(deadline=None)
@given(
    theta=st.floats(1e3, 1e9),
    window=st.integers(16, 1 << 18),
    ratio=st.integers(1, 16),
    head_dim=st.sampled_from([4, 16, 64, 128]),
    factor=st.floats(1.0, 8.0),
)
def test_a_longer_window_never_lowers_theta(theta, window, ratio, head_dim, factor):
    previous = RotaryPoint(theta, window)
    longer = dynamic_ntk(previous, window * ratio, head_dim, factor)
    assert longer >= int(theta * (1 - 1e-12))
    assert longer == int(longer)
    assert dynamic_ntk(previous, window * (ratio + 1), head_dim, factor) >= longer


def test_a_stage_takes_its_theta_from_its_predecessor_or_from_the_base():
    previous = RotaryPoint(15296098, 65_536)
    arguments = {"window": 262_144, "head_dim": 128, "base": BASE, "previous": previous}
    assert stage_theta("dynamic_ntk", factor=4.0, **arguments) == 207112184
    assert stage_theta("dynamic_ntk", factor=4.0, declared=207112184.0, **arguments) == 207112184
    assert stage_theta("scaling_law", **arguments) == 283461213
    assert stage_theta("fixed", declared=1.5e8, **arguments) == 1.5e8


@pytest.mark.parametrize(
    ("law", "declared", "said"),
    [
        ("dynamic_ntk", 1e8, "100000000 contradicts stage.theta_law=dynamic_ntk, which gives 207112184"),
        ("fixed", None, "without stage.theta"),
        ("fixed", 0.5, "above 1"),
        ("power", None, "dynamic_ntk, scaling_law, unchanged, fixed"),
    ],
)
def test_a_theta_that_does_not_follow_its_law_is_refused(law, declared, said):
    with pytest.raises(ThetaError, match=said):
        stage_theta(
            law, window=262_144, head_dim=128, base=BASE, previous=RotaryPoint(15296098, 65_536), declared=declared
        )


def test_a_shrinking_window_is_refused():
    with pytest.raises(ThetaError, match="shrinks from 8192 to 4096"):
        dynamic_ntk(BASE, 4096, head_dim=128, factor=4.0)


def test_a_checkpoint_with_another_theta_or_window_is_refused():
    expected = RotaryPoint(15296098, 65_536)
    check_follows(RotaryPoint(15296098.0, 65_536), expected, "runs/65k")
    with pytest.raises(ThetaError, match=r"runs/65k has theta 500000, .* 15296098"):
        check_follows(RotaryPoint(500_000, 65_536), expected, "runs/65k")
    with pytest.raises(ThetaError, match="window of 8192"):
        check_follows(RotaryPoint(15296098, 8192), expected, "runs/65k")
