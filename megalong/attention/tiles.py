"""Causal and document masks as a list of rectangles to compute between some queries and some keys.

Causality, zigzag order and document boundaries all reduce to a list of `Tile`: a slice of queries, a slice of
keys, and whether the tile is full or causal. No mask tensor exists anywhere. Two different chunks share at most
one document, hence give at most one full rectangle; a chunk with itself gives one causal square per document.
Neighbouring tiles are merged, so that without documents every step of a ring is exactly one tile.

Pure integers: no torch, no process group.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

Documents = tuple[int, ...] | None
"""Global positions at which documents start: ascending, the first is 0. None: the sequence is one document."""


class Tile(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1), as indices into the local tensors.

    A full tile attends every pair. A causal tile is square and lies on the diagonal: query q0+i sees keys
    k0..k0+i. (Square, because kernels disagree on how a causal rectangle is aligned.)
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs that are attended."""
        n, m = self.q1 - self.q0, self.k1 - self.k0
        return n * (n + 1) // 2 if self.causal else n * m


Tiles = tuple[Tile, ...]


def tiles(
    q_ranges: Sequence[tuple[int, int]], k_ranges: Sequence[tuple[int, int]], documents: Documents = None
) -> Tiles:
    """The tiles that cover exactly {(q, k): k <= q, same document}, each pair once.

    Args:
        q_ranges: global [start, stop) of the queries, in the order in which they lie in the local tensor.
        k_ranges: the same of the keys. A key range equals a query range or is disjoint from it.
        documents: starts of the documents.

    Returns:
        causal tiles first (in ascending order), then full ones. Empty tiles are left out.
    """
    causal: list[Tile] = []
    full: list[Tile] = []
    q_at = 0
    for q_range in q_ranges:
        k_at = 0
        for k_range in k_ranges:
            if k_range == q_range:
                causal += _diagonal(q_range, q_at, k_at, documents)
            elif k_range[0] < q_range[1]:
                full += _rectangle(q_range, k_range, q_at, k_at, documents)
            k_at += k_range[1] - k_range[0]
        q_at += q_range[1] - q_range[0]
    return _merged(causal, full)


def pairs(of: Iterable[Tile]) -> int:
    """(query, key) pairs in a list of tiles: its work, in units of 4*D FLOP per head forward."""
    return sum(t.pairs for t in of)


def halves(of: Tiles) -> tuple[Tiles, Tiles]:
    """Two lists that cover the same pairs as `of`, as equal in work as whole tiles allow.

    A causal tile that is most of the work is cut in the square below its diagonal and its two causal corners.
    """
    total = pairs(of)
    parts: list[Tile] = []
    for t in of:
        if t.causal and 4 * t.pairs > 3 * total and t.q1 - t.q0 > 1:
            h = (t.q1 - t.q0) // 2
            qm, km = t.q0 + h, t.k0 + h
            parts += [Tile(qm, t.q1, t.k0, km, False), Tile(t.q0, qm, t.k0, km, True), Tile(qm, t.q1, km, t.k1, True)]
        else:
            parts.append(t)
    first: list[Tile] = []
    done = 0
    for t in parts:
        if 2 * done + t.pairs > total:
            break
        first.append(t)
        done += t.pairs
    return tuple(first), tuple(parts[len(first) :])


def _diagonal(chunk: tuple[int, int], q_at: int, k_at: int, documents: Documents) -> list[Tile]:
    start, stop = chunk
    if documents is None:
        bounds = [start, stop]
    else:
        inner = documents[bisect_right(documents, start) : bisect_right(documents, stop - 1)]
        bounds = [start, *inner, stop]
    return [
        Tile(a - start + q_at, b - start + q_at, a - start + k_at, b - start + k_at, True) for a, b in pairwise(bounds)
    ]


def _rectangle(
    q_range: tuple[int, int], k_range: tuple[int, int], q_at: int, k_at: int, documents: Documents
) -> list[Tile]:
    (qa, qb), (ka, kb) = q_range, k_range
    assert kb <= qa, f"key range {k_range} overlaps query range {q_range}"
    if documents is not None:
        # The only document that both can share holds the last key and the first query.
        following = bisect_right(documents, kb - 1)
        ka, start = max(ka, documents[following - 1]), ka
        if following < len(documents):
            qb = min(qb, documents[following])
        k_at += ka - start
    if qb <= qa:
        return []
    return [Tile(q_at, q_at + qb - qa, k_at, k_at + kb - ka, False)]


def _merged(causal: list[Tile], full: list[Tile]) -> Tiles:
    """Fewer, larger tiles: two causal squares with the square between them, and neighbouring rectangles."""
    square = {(t.q0, t.k0): t for t in causal}
    ends = {(t.q1, t.k1): t for t in causal}
    rest: list[Tile] = []
    for t in full:
        upper, lower = ends.get((t.q0, t.k1)), square.get((t.q0, t.k1))
        if upper and lower and (upper.k0, lower.q1) == (t.k0, t.q1):
            whole = Tile(upper.q0, lower.q1, upper.k0, lower.k1, True)
            for old in (upper, lower):
                del square[old.q0, old.k0], ends[old.q1, old.k1]
            square[whole.q0, whole.k0] = ends[whole.q1, whole.k1] = whole
        else:
            rest.append(t)
    return (*sorted(square.values()), *joined(rest))


def joined(of: Iterable[Tile]) -> Tiles:
    """Full tiles that touch along keys, then along queries, made into one."""
    along_keys: list[Tile] = []
    for t in sorted(of):
        last = along_keys[-1] if along_keys else None
        if last and (last.q0, last.q1, last.k1) == (t.q0, t.q1, t.k0):
            along_keys[-1] = last._replace(k1=t.k1)
        else:
            along_keys.append(t)
    along_queries: list[Tile] = []
    for t in sorted(along_keys, key=lambda t: (t.k0, t.k1, t.q0)):
        last = along_queries[-1] if along_queries else None
        if last and (last.k0, last.k1, last.q1) == (t.k0, t.k1, t.q0):
            along_queries[-1] = last._replace(q1=t.q1)
        else:
            along_queries.append(t)
    return tuple(along_queries)
