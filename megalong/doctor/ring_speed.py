"""How fast is one rank's share of a ring, beside a single kernel call on as many pairs? Blocks come from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megalong.attention import kernels, ring
from megalong.attention.exchange import Move, Pending, Ring
from megalong.attention.kernel import Attended
from megalong.attention.tiles import pairs

BACKWARD_FLOPS = 2.5  # of a flash backward, in forwards: five matrix products instead of two


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compute_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time of `work` where nothing is waited for: of the one thread on the CPU, so that other processes count less."""
    if device.type == "cuda":
        return seconds(work, device)
    assert torch.get_num_threads() == 1
    began = time.thread_time()
    work()
    return time.thread_time() - began


def problem(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """q, k, v, dout of one sequence, [S, 1, heads, D]."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(tokens, 1, n, head_dim, generator=generator).to(device, dtype) for n in sizes]


class FromMemory(Ring):
    """A place in a ring whose neighbours always have the next block ready in the buffer."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__(None)
        self.size, self.rank = size, rank
        self._filled: set[int] = set()

    def shift(self, *moves: Move) -> Pending:
        for _, mine, there in moves:
            if there.data_ptr() not in self._filled:
                there.copy_(mine)
                self._filled.add(there.data_ptr())
        return Pending(())


def ring_compute(
    size: int,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    kernel_name: str,
    repeats: int,
) -> dict[str, Any]:
    """One rank of a ring of `size` against one call of the kernel: full attention over size/2 times the local keys.

    Args:
        shape: (local tokens, heads, key-value heads, head dim).
    """
    tokens, heads, kv_heads, head_dim = shape
    q, k, v, dout = problem(tokens, heads, kv_heads, head_dim, dtype, device)
    kernel = kernels.select(kernel_name, device, dtype, head_dim, head_dim**-0.5)
    rank = size // 2
    steps = ring.plan(tokens * size, size, rank, None)
    long_k, long_v = (x.repeat(size // 2, 1, 1, 1) for x in (k, v))
    q_, k_, v_, dout_ = (x.permute(1, 2, 0, 3) for x in (q, long_k, long_v, dout))
    work = sum(map(pairs, steps))
    assert abs(work - tokens * tokens * size / 2) <= tokens, "both sides must do the same work"

    result: dict[str, list[float]] = {"forward": [], "backward": [], "ring_forward_s": [], "ring_backward_s": []}
    out, lse = ring.forward(q, k, v, FromMemory(size, rank), steps, kernel)
    whole = Attended(q_, k_, v_, *kernel.forward(q_, k_, v_, False))
    for _ in range(repeats):
        mine = compute_seconds(lambda: ring.forward(q, k, v, FromMemory(size, rank), steps, kernel), device)
        one = compute_seconds(lambda: kernel.forward(q_, k_, v_, False), device)
        mine_back = compute_seconds(
            lambda: ring.backward(
                dout, Attended(q, k, v, out, lse), FromMemory(size, rank), steps, kernel, torch.float32
            ),
            device,
        )
        one_back = compute_seconds(lambda: kernel.backward(dout_, whole, False), device)
        result["forward"].append(one / mine)
        result["backward"].append(one_back / mine_back)
        result["ring_forward_s"].append(mine)
        result["ring_backward_s"].append(mine_back)
    flop = 4.0 * work * heads * head_dim
    times = {name: statistics.median(x) for name, x in result.items()}
    return {
        "forward": round(times["forward"], 3),
        "backward": round(times["backward"], 3),
        "forward_tflops": round(flop / times["ring_forward_s"] / 1e12, 3),
        "backward_tflops": round(BACKWARD_FLOPS * flop / times["ring_backward_s"] / 1e12, 3),
        "all": {name: [round(x, 3) for x in result[name]] for name in ("forward", "backward")},
    }
