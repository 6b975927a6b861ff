"""Peak memory is bounded by the formula, and for p2p does not grow with the sequence at a fixed local length."""

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megalong.attention import kernels, memory, traffic
from megalong.runtime.ranks import RankPool
from tests.attention.test_algorithms import algorithm

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
WORKSPACE = 4 * 2**20  # of PyTorch's CPU kernel: score tiles of one thread, whatever the lengths


class Shapes:
    """Allocates what a kernel returns and computes nothing, so that the buffers of 64k tokens are seen at once."""

    name = "shapes"
    varlen = False

    def forward(self, q, k, v, causal, cu_seqlens=None):  # type: ignore[no-untyped-def]
        return torch.zeros_like(q), torch.zeros(q.shape[:-1])

    def backward(self, dout, attended, causal, cu_seqlens=None):  # type: ignore[no-untyped-def]
        return tuple(torch.zeros_like(x) for x in attended[:3])


def peaks(
    name: str, sizes: tuple[int, int] | None, tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, real: bool
) -> tuple[int, int]:
    """Highest live bytes beyond the inputs, forward and backward, from every allocation of torch's CPU allocator."""
    attend = algorithm(name, sizes)
    q, k, v = (
        torch.zeros(tokens, 1, n, HEAD_DIM, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)
    )
    dout = torch.ones_like(q)
    kernel = kernels.select("auto", q.device, dtype, HEAD_DIM, 0.25) if real else Shapes()
    found = []
    out = q
    for step in ("forward", "backward"):
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            if step == "forward":
                out = attend(q, k, v, None, kernel, torch.float32)
            else:
                torch.autograd.grad(out, (q, k, v), dout)
        assert record.profiler is not None
        results = record.profiler.kineto_results
        assert results is not None
        events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
        live = highest = 0
        for _, change in events:
            live += change
            highest = max(highest, live)
        found.append(highest)
    return found[0], found[1]


def test_buffers_at_64k_tokens_are_those_of_the_formula(ranks: RankPool) -> None:
    for name, size, sizes, dtype in [
        ("p2p", 1, None, torch.float32),
        ("p2p", 2, None, torch.bfloat16),
        ("p2p", 4, None, torch.float32),
        ("p2p", 4, None, torch.bfloat16),
        ("a2a", 2, None, torch.bfloat16),
        ("a2a+p2p", 4, (2, 2), torch.bfloat16),
        ("all_gather", 4, None, torch.bfloat16),
    ]:
        tokens = 65536 // size
        shard = traffic.Shard(tokens, HEADS, KV_HEADS, HEAD_DIM, element_bytes=dtype.itemsize)
        allowed = memory.peak_bytes(name, shard, size, sizes[0] if sizes else None)
        by_rank = ranks.run(peaks, size, name, sizes, tokens, HEADS, KV_HEADS, dtype, False)
        for measured, most in zip(zip(*by_rank, strict=True), allowed, strict=True):
            backend = size * shard.block * dtype.itemsize if name == "all_gather" else 0  # gloo's copy
            assert 0.6 * most < max(measured) <= most + backend, (name, size, measured, most)


def test_peak_with_the_real_kernel_at_64k_tokens_is_bounded_whatever_the_ring(ranks: RankPool) -> None:
    tokens = 16384
    shard = traffic.Shard(tokens, 1, 1, HEAD_DIM, element_bytes=4)
    by_size = []
    for size in (2, 4):
        worst = [
            max(x) for x in zip(*ranks.run(peaks, size, "p2p", None, tokens, 1, 1, torch.float32, True), strict=True)
        ]
        for measured, most in zip(worst, memory.peak_bytes("p2p", shard, size), strict=True):
            assert measured < most + WORKSPACE
        by_size.append(worst)
    (forward_32k, backward_32k), (forward_64k, backward_64k) = by_size
    assert forward_64k <= 1.01 * forward_32k
    assert backward_64k <= 1.01 * backward_32k


def test_a_deterministic_flash_backward_holds_a_dq_for_each_of_its_copies() -> None:
    """L40S: 142 multiprocessors, 16 heads: 9 copies of an fp32 dQ of 32,768 rows, 2.4 GB."""
    shard = traffic.Shard(tokens=32_768, heads=16, kv_heads=4, head_dim=128)
    once, nine = memory.flash_scratch(shard, 32_768), memory.flash_scratch(shard, 32_768, copies=9)
    one_dq = 4 * (32_768 + 128) * 16 * 128
    assert nine - once == 8 * one_dq
    assert 9 * one_dq == 2_425_356_288
    # gathered keys are longer than the rows, and dK and dV of every query head with them
    assert memory.flash_scratch(shard, 16 * 32_768) - once == 2 * 15 * 32_768 * 16 * 128 * 2
    assert memory.flash_scratch(shard, 32_768, documents=17) - once == 16 * 128 * 16 * 128 * 4
