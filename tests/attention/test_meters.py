"""Counted bytes are the closed formulas', and counting is off unless asked for."""

import pytest
import torch
import torch.distributed as dist

from megalong.attention import kernels, meters, traffic
from megalong.runtime.ranks import RankPool
from tests.attention.test_algorithms import ALGORITHMS, algorithm


def counted(
    name: str,
    sizes: tuple[int, int] | None,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    wire: torch.dtype,
) -> list[tuple[dict[str, int], dict[str, int]]]:
    """(sent, received) of a forward and of a backward on this rank; shape is (S, H, K, D)."""
    attend = algorithm(name, sizes)
    tokens, heads, kv_heads, head_dim = shape
    q, k, v = (torch.randn(tokens, 1, n, head_dim).to(dtype).requires_grad_() for n in (heads, kv_heads, kv_heads))
    kernel = kernels.select("auto", q.device, dtype, head_dim, 0.25)
    with meters.recording() as forward:
        out = attend(q, k, v, None, kernel, wire)
    with meters.recording() as backward:
        out.backward(torch.randn_like(out))
    if dist.get_world_size() > 1:
        assert forward.exposed_seconds > 0
        assert forward.summary()["attention_bytes_sent"] == sum(forward.sent.values()) > 0
    return [(dict(m.sent), dict(m.received)) for m in (forward, backward)]


@pytest.mark.parametrize(("dtype", "wire"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize(("name", "size", "sizes", "kv_heads"), ALGORITHMS)
def test_bytes_are_the_closed_formula(
    ranks: RankPool,
    name: str,
    size: int,
    sizes: tuple[int, int] | None,
    kv_heads: int,
    dtype: torch.dtype,
    wire: torch.dtype,
) -> None:
    shape = (8, 4 * kv_heads, kv_heads, 16)  # H/K as in Llama-3-8B
    shard = traffic.Shard(*shape, element_bytes=dtype.itemsize, wire_bytes=wire.itemsize)
    inner = sizes[0] if sizes else None
    formulas = [f(name, shard, size, inner) for f in (traffic.forward_bytes, traffic.backward_bytes)]
    for found in ranks.run(counted, size, name, sizes, shape, dtype, wire):
        for (sent, received), formula in zip(found, formulas, strict=True):
            assert sent == received == formula


def test_a_collective_outside_a_recording_is_not_counted() -> None:
    with meters.recording() as meter:
        meters.count("a2a", 3, 4)
    meters.count("a2a", 5, 6)
    assert (meter.sent, meter.received, meter.calls) == ({"a2a": 3}, {"a2a": 4}, {"a2a": 1})
    waited = []
    meters.timed(lambda: waited.append(True))
    assert waited == [True]
    assert meter.exposed_seconds == 0.0


def test_the_1048k_layout_by_hand() -> None:
    """Llama-3-8B, 1,048,576 tokens, TP 4 and a ring of 32: 32,768 tokens, 8 query and 2 key-value heads of 128."""
    shard = traffic.Shard(tokens=32768, heads=8, kv_heads=2, head_dim=128)
    assert shard.block * 2 == 32 * 2**20
    assert traffic.forward_bytes("p2p", shard, 32) == {"ring_kv": 31 * 32 * 2**20}
    assert traffic.backward_bytes("p2p", shard, 32) == {"ring_kv": 31 * 32 * 2**20, "ring_dkv": 31 * 64 * 2**20}
    by_heads = traffic.forward_bytes("a2a+p2p", shard, 32, inner=2)
    assert by_heads == {"a2a": (64 + 64 + 32) * 2**20 // 2, "ring_kv": 15 * 32 * 2**20}
