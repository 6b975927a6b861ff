"""Travel is hidden exactly as far as there is computing beside it."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.planning.activations import Tape
from megalong.planning.ring import Moves, backward_pass, forward_pass
from megalong.planning.workload import Workload, workload_of
from megalong.recipe.resolve import run_of
from megalong.topology.layout import Layout
from megalong.topology.links import NOTHING, Wire

WORK = workload_of(run_of(["+stage=262k"]))


def ring_of(n: int, **changes: object) -> Workload:
    return dataclasses.replace(WORK.on(Layout(cp=n)), **changes)  # type: ignore[arg-type]


def at(rate: float) -> Moves:
    return Moves(Wire("leaf", rate, 0.0), NOTHING)


@settings(deadline=None)
@given(n=st.sampled_from([2, 4, 8, 32]), rate=st.floats(1e6, 1e12), flops=st.floats(1e12, 1e15))
def test_hidden_and_exposed_make_up_the_travel(n, rate, flops):
    for one in (forward_pass(ring_of(n), at(rate), flops), backward_pass(ring_of(n), at(rate), flops)):
        assert 0 <= one.exposed <= one.travel
        assert one.hidden + one.exposed == pytest.approx(one.travel)
        assert one.seconds >= max(one.compute, one.exposed)


def test_fast_wires_expose_nothing_and_slow_ones_almost_everything() -> None:
    work = ring_of(8)
    assert forward_pass(work, at(1e15), 1e14).exposed == 0
    slow = forward_pass(work, at(1e6), 1e14)
    assert slow.exposed > 0.99 * slow.travel


def test_travel_is_bytes_over_rate() -> None:
    work = ring_of(8)
    block = 2 * work.local_tokens * 8 * 128
    assert forward_pass(work, at(1e9), 1e14).travel == pytest.approx(7 * block * 2 / 1e9)
    assert backward_pass(work, at(1e9), 1e14).travel == pytest.approx(7 * block * (2 + 4) / 1e9)


@pytest.mark.parametrize("comm", ["all_gather", "a2a+p2p"])
def test_other_algorithms_travel_too(comm: str) -> None:
    work = ring_of(8, cp_comm_type=comm, hierarchical_sizes=(4, 2))
    moves = Moves(Wire("leaf", 1e9, 1e-5), Wire("node", 1e10, 1e-5))
    for one in (forward_pass(work, moves, 1e14), backward_pass(work, moves, 1e14)):
        assert one.travel > 0
        assert 0 <= one.exposed <= one.travel


def test_trading_heads_inside_a_node_leaves_less_for_the_slow_wire() -> None:
    slow = Moves(Wire("leaf", 1e8, 0.0), Wire("node", 1e11, 0.0))
    flat = forward_pass(ring_of(8), slow, 1e15)
    inside = forward_pass(ring_of(8, cp_comm_type="a2a+p2p", hierarchical_sizes=(4, 2)), slow, 1e15)
    assert inside.exposed < 0.3 * flat.exposed


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=30))
def test_a_tape_ends_where_it_began_and_its_peak_can_be_taken_apart(events):
    tape, held = Tape(), []
    for size, release in events:
        if release and held:
            tape.drop(held.pop())
        else:
            held.append(tape.take("odd" if size % 2 else "even", size))
        assert tape.live <= tape.peak
        assert sum(tape.at_peak.values()) == tape.peak
    tape.move("odd", *held)
    tape.drop(*held)
    assert tape.live == 0
