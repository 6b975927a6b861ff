"""Every way of moving keys gives attention itself: outputs and gradients against the fp64 definition."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core.parallel_state import create_hierarchical_groups

from megalong.attention import kernels, zigzag
from megalong.attention.algorithms import Algorithm
from megalong.attention.merge import accumulation_dtype
from megalong.runtime.ranks import RankPool
from tests.attention.reference import attention, inputs

LENGTH = 64
CHUNK_EDGES = (0, 8, 32, 40)  # documents that end where a chunk of CP 2, 4 or 8 ends
SPANNING = (0, 3, 29, 61)  # one document spans most ranks
ONE_TOKEN = (*range(0, 21), 40)  # twenty documents of one token
DOCUMENTS = {"none": None, "chunk edges": CHUNK_EDGES, "spanning": SPANNING, "one token": ONE_TOKEN}


class Case(NamedTuple):
    """One attention problem."""

    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    documents: tuple[int, ...] | None
    padded: int = 0
    """Tokens at the end that are padding: a document of their own, with no gradient from the loss."""
    masked_rank: int | None = None
    """A rank from whose tokens no loss is taken."""
    batch: int = 1
    kernel: str = "auto"
    length: int = LENGTH


def algorithm(name: str, sizes: tuple[int, int] | None) -> Algorithm:
    """`name` over all ranks of the task."""
    ranks = list(range(dist.get_world_size()))
    hierarchy = create_hierarchical_groups(dist.get_rank(), ranks, list(sizes))[0] if sizes else None
    return Algorithm(name, dist.group.WORLD, hierarchy)


@functools.lru_cache(maxsize=256)  # ranks live as long as the test run, and meet the same cases again
def problem(c: Case, size: int) -> tuple[list[torch.Tensor], tuple[int, ...] | None, tuple[torch.Tensor, ...]]:
    """(full inputs, documents, right answers) of a case."""
    full = [x.to(c.dtype) for x in inputs(c.length, c.batch, c.heads, c.kv_heads, c.head_dim)]
    documents = c.documents
    if c.padded:
        full[3][-c.padded :] = 0
        documents = (*(documents or (0,)), c.length - c.padded)
    if c.masked_rank is not None:
        full[3][zigzag.local_positions(c.length, size, c.masked_rank % size)] = 0
    return full, documents, attention(*full, documents)


def squared_errors(
    name: str, sizes: tuple[int, int] | None, cases: list[Case], wire: torch.dtype | None
) -> list[list[tuple[float, float]]]:
    """For each case and each of (out, dq, dk, dv): this rank's (squared error, squared norm of the right answer)."""
    n, r = dist.get_world_size(), dist.get_rank()
    attend = algorithm(name, sizes)
    found = []
    for c in cases:
        full, documents, right = problem(c._replace(kernel="auto"), n if c.masked_rank is not None else 1)
        q, k, v, dout = (zigzag.shard(x, n, r) for x in full)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        kernel = kernels.select(c.kernel, q.device, c.dtype, c.head_dim, 1 / math.sqrt(c.head_dim))
        out = attend(q, k, v, documents, kernel, wire or accumulation_dtype(c.dtype))
        grads = torch.autograd.grad(out, (q, k, v), dout)
        assert all(g.dtype == c.dtype and torch.isfinite(g).all() for g in (out, *grads))
        found.append(
            [
                ((a.detach().double() - b).square().sum().item(), b.square().sum().item())
                for a, b in zip((out, *grads), (zigzag.shard(x, n, r) for x in right), strict=True)
            ]
        )
    return found


def relative_errors(
    ranks: RankPool,
    size: int,
    name: str,
    sizes: tuple[int, int] | None,
    cases: list[Case],
    wire: torch.dtype | None = None,
) -> list[list[float]]:
    """Relative L2 error of the whole (out, dq, dk, dv), for each case."""
    by_rank = torch.tensor(ranks.run(squared_errors, size, name, sizes, cases, wire), dtype=torch.float64)
    error, norm = by_rank.sum(0).unbind(-1)
    return (error / norm.clamp_min(1e-300)).sqrt().tolist()


ALGORITHMS = [
    ("p2p", 1, None, 1),
    ("p2p", 2, None, 1),
    ("p2p", 4, None, 1),
    ("p2p", 8, None, 1),
    ("a2a", 2, None, 2),
    ("a2a", 4, None, 4),
    ("a2a", 8, None, 8),
    ("a2a+p2p", 4, (2, 2), 2),
    ("a2a+p2p", 8, (2, 4), 2),
    ("a2a+p2p", 8, (4, 2), 4),
    ("all_gather", 2, None, 1),
    ("all_gather", 4, None, 1),
    ("all_gather", 8, None, 1),
]
"""(cp_comm_type, ranks, hierarchical sizes, fewest key-value heads)"""


@pytest.mark.parametrize(("name", "size", "sizes", "kv_heads"), ALGORITHMS)
def test_outputs_and_gradients_are_those_of_attention(
    ranks: RankPool, name: str, size: int, sizes: tuple[int, int] | None, kv_heads: int
) -> None:
    fp32 = torch.float32
    cases = [
        Case(fp32, kv_heads * ratio, kv_heads, head_dim, documents)
        for ratio, head_dim in ((1, 64), (4, 128), (8, 64), (2, 128))
        for documents in DOCUMENTS.values()
    ]
    cases += [
        Case(fp32, 2 * kv_heads, kv_heads, 64, None, padded=23),
        Case(fp32, 2 * kv_heads, kv_heads, 64, SPANNING, padded=1, batch=2),
        Case(fp32, 2 * kv_heads, kv_heads, 64, None, masked_rank=size - 1),
        Case(fp32, 2 * kv_heads, kv_heads, 64, CHUNK_EDGES, masked_rank=0),
        Case(fp32, 4 * kv_heads, 2 * kv_heads, 64, None, batch=2),
    ]
    worst = max(max(e) for e in relative_errors(ranks, size, name, sizes, cases))
    assert worst <= 2e-6
    wide = [
        Case(torch.float64, 2 * kv_heads, kv_heads, 64, documents, kernel=kernel)
        for documents in (None, SPANNING)
        for kernel in ("reference", "cpu_flash")
    ]
    assert max(max(e) for e in relative_errors(ranks, size, name, sizes, wide)) < 1e-14


@pytest.mark.parametrize(("sizes", "kv_heads"), [((1, 2), 1), ((2, 1), 2)])
def test_a_hierarchy_may_have_a_level_of_one(ranks: RankPool, sizes: tuple[int, int], kv_heads: int) -> None:
    cases = [Case(torch.float32, 4 * kv_heads, kv_heads, 64, documents) for documents in (None, SPANNING)]
    assert max(max(e) for e in relative_errors(ranks, 2, "a2a+p2p", sizes, cases)) <= 2e-6


def test_bf16_error_does_not_grow_with_the_ring(ranks: RankPool) -> None:
    for documents in (None, (0, 100, 130)):
        case = Case(torch.bfloat16, 8, 2, 64, documents, length=512)
        alone = relative_errors(ranks, 1, "p2p", None, [case])[0]
        for name in ("p2p", "all_gather"):
            for error, at_one in zip(relative_errors(ranks, 8, name, None, [case])[0], alone, strict=True):
                assert error <= 1.3 * at_one


def test_gradients_rounded_on_the_wire_lose_more_the_longer_the_ring(ranks: RankPool) -> None:
    """Why `grad_wire_dtype` is fp32 unless asked: with a kernel exact in itself, only the wire differs."""
    case = Case(torch.bfloat16, 8, 2, 64, None, length=512, kernel="reference")
    at_2, at_8 = ({w: relative_errors(ranks, n, "p2p", None, [case], w)[0] for w in (None, case.dtype)} for n in (2, 8))
    for gradient in (2, 3):  # dk, dv
        assert at_8[None][gradient] < 1.1 * at_2[None][gradient]
        assert at_8[case.dtype][gradient] > 1.3 * at_2[case.dtype][gradient]
    assert at_8[case.dtype][1] == at_8[None][1], "dq does not travel"
