"""Ranks and coordinates: a bijection, groups that partition the ranks, megatron's order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalong.runtime.errors import LayoutError
from megalong.topology.layout import ORDER, Coordinates, Layout, factorisations

sizes = st.integers(1, 4)
layouts = st.builds(Layout, tp=sizes, cp=sizes, pp=sizes, dp=sizes)


@given(layouts)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    assert [layout.rank(layout.coordinates(r)) for r in range(layout.world_size)] == list(range(layout.world_size))


@given(layouts, st.sets(st.sampled_from(ORDER)))
def test_groups_along_any_axes_partition_the_ranks(layout: Layout, axes: set) -> None:
    groups = layout.groups(*axes)
    assert sorted(r for g in groups for r in g) == list(range(layout.world_size))
    assert all(layout.group(r, *axes) == g for g in groups for r in g)


def test_the_order_is_megatrons_tp_cp_dp_pp() -> None:
    layout = Layout(tp=2, cp=2, dp=2, pp=2)
    assert [layout.stride(a) for a in ("tp", "cp", "dp", "pp")] == [1, 2, 4, 8]
    assert layout.coordinates(13) == Coordinates(tp=1, cp=0, dp=1, pp=1)
    assert layout.rings()[:2] == [[0, 2], [1, 3]]


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_a_size_that_is_no_positive_integer_is_refused(size: object) -> None:
    with pytest.raises(LayoutError, match=r"topology\.cp="):
        Layout(cp=size)  # type: ignore[arg-type]


def test_factorisations_are_all_and_only_the_ordered_ones() -> None:
    found = list(factorisations(12, 3))
    assert all(a * b * c == 12 for a, b, c in found)
    assert len(set(found)) == len(found) == 18
