"""Tiles cover exactly the pairs that attention allows, each once, and share the work evenly."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention import gather, ring
from megalong.attention.blocks import calls
from megalong.attention.kernels import CpuFlash, Reference
from megalong.attention.tiles import Documents, Tile, Tiles, halves, pairs, tiles
from megalong.attention.zigzag import chunk_ranges, local_positions
from tests.attention.reference import allowed


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, Documents]:
    """(sequence length, CP, document starts)."""
    cp = draw(st.integers(1, 8))
    length = 2 * cp * draw(st.integers(1, 9))
    starts = draw(st.none() | st.sets(st.integers(1, length - 1)))
    return length, cp, None if starts is None else (0, *sorted(starts))


def paint(canvas: torch.Tensor, of: Tiles, queries: torch.Tensor, keys: torch.Tensor) -> None:
    """Add one to every (query, key) pair that the tiles attend, at global positions."""
    for t in of:
        patch = torch.ones(t.q1 - t.q0, t.k1 - t.k0, dtype=torch.int64)
        rows, columns = queries[t.q0 : t.q1], keys[t.k0 : t.k1]
        canvas[rows[:, None], columns[None]] += patch.tril() if t.causal else patch


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_steps_of_a_ring_cover_every_allowed_pair_once(problem: tuple[int, int, Documents]) -> None:
    length, cp, documents = problem
    canvas = torch.zeros(length, length, dtype=torch.int64)
    for r in range(cp):
        for s, of in enumerate(ring.plan(length, cp, r, documents)):
            paint(canvas, of, local_positions(length, cp, r), local_positions(length, cp, (r - s) % cp))
    assert torch.equal(canvas, allowed(length, documents).long())


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_gathered_tiles_cover_every_allowed_pair_once(problem: tuple[int, int, Documents]) -> None:
    length, cp, documents = problem
    canvas = torch.zeros(length, length, dtype=torch.int64)
    chunks = [local_positions(length, cp, r).chunk(2) for r in range(cp)]
    early, late = (torch.cat([pair[half] for pair in chunks]) for half in (0, 1))
    for r in range(cp):
        of, own = gather.plan(length, cp, r, documents), local_positions(length, cp, r)
        paint(canvas, of.own, own, own)
        paint(canvas, of.early, own, early)
        paint(canvas, of.late, own, late)
    assert torch.equal(canvas, allowed(length, documents).long())


@settings(deadline=None)
@given(problems())
def test_the_two_halves_of_a_block_cover_what_it_covers(problem: tuple[int, int, Documents]) -> None:
    length, cp, documents = problem
    own = chunk_ranges(length, cp, cp - 1)
    whole = tiles(own, own, documents)
    first, last = halves(whole)
    positions = torch.arange(length // cp)
    both, once = torch.zeros(2, length // cp, length // cp, dtype=torch.int64)
    paint(both, (*first, *last), positions, positions)
    paint(once, whole, positions, positions)
    assert torch.equal(both, once)
    largest = max(t.pairs for t in whole)
    assert abs(pairs(first) - pairs(last)) <= max(largest, length // cp)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 40))
def test_without_documents_the_work_of_ranks_differs_by_at_most_one_diagonal(cp: int, chunk: int) -> None:
    work = [sum(map(pairs, ring.plan(2 * cp * chunk, cp, r, None))) for r in range(cp)]
    assert max(work) - min(work) <= chunk * (chunk + 1) // 2
    assert sum(work) == 2 * cp * chunk * (2 * cp * chunk + 1) // 2


def test_without_documents_every_step_is_one_tile_of_equal_work() -> None:
    for cp in (2, 3, 8):
        for r in range(cp):
            own, *others = ring.plan(2 * cp * 16, cp, r, None)
            assert [len(own), *map(len, others)] == [1] * cp
            assert {pairs(x) for x in others} == {2 * 16 * 16}
            assert own == (Tile(0, 32, 0, 32, True),)


def test_two_different_chunks_share_at_most_one_rectangle() -> None:
    assert tiles([(32, 64)], [(0, 32)], (0, 20, 45)) == (Tile(0, 13, 20, 32, False),)
    assert tiles([(32, 64)], [(0, 32)], (0, 32)) == ()
    assert tiles([(0, 32)], [(32, 64)], None) == ()


def test_a_document_across_the_seam_of_the_two_local_chunks_is_one_causal_tile() -> None:
    assert tiles([(0, 8), (8, 16)], [(0, 8), (8, 16)], (0, 5, 12)) == (
        Tile(0, 5, 0, 5, True),
        Tile(5, 12, 5, 12, True),
        Tile(12, 16, 12, 16, True),
    )


def test_overlapping_but_different_ranges_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="overlaps"):
        tiles([(4, 12)], [(0, 8)])


@settings(deadline=None)
@given(problems())
def test_a_run_of_documents_is_one_call_where_the_kernel_can(problem: tuple[int, int, Documents]) -> None:
    length, cp, documents = problem
    whole = ring.plan(length, cp, 0, documents)[0]
    one_by_one = calls(whole, CpuFlash(1.0))
    assert [c.tile for c in one_by_one] == list(whole)
    together = calls(whole, Reference(1.0))
    causal = [c for c in together if c.tile.causal]
    assert len(causal) == 1
    run, cu_seqlens = causal[0]
    squares = [t for t in whole if t.causal]
    if len(squares) == 1:
        assert cu_seqlens is None
    else:
        assert cu_seqlens is not None
        assert [(a, b) for a, b in pairwise(cu_seqlens)] == [(t.q0 - run.q0, t.q1 - run.q0) for t in squares]
