"""What can this machine really do? Measures it with the shapes of a run and turns the results into cluster facts.

All ranks measure at the same time, as they will train: ranks that share cores, memory or wires share them here too.
Collective: every rank calls every function; results are the slowest rank's, the same on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.attention import kernels, kernels_cuda
from megalong.attention.kernel import Attended
from megalong.config.cluster import ClusterConfig, Fact, limit, with_whole_shares
from megalong.model.norm import RMSNorm
from megalong.planning.duration import GATED_FORWARD, NORM_FORWARD
from megalong.planning.workload import Workload
from megalong.runtime import device

SIZES = (4096, 65536, 524288, 2097152)  # messages, bytes; more on CUDA
SIZES_INSIDE = (4096, 524288, 4194304, 16777216)  # inside a node, where the largest of SIZES is over in a blink


@dataclass(frozen=True)
class Line:
    """A transfer takes `latency_s + bytes / bytes_per_second`."""

    latency_s: float
    bytes_per_second: float


def slowest_seconds(fn: Callable[[], Any], repeat: int = 7) -> float:
    """Time of `fn` on the slowest rank: the best of several attempts, so that other work of the machine drops out."""
    fn()
    device.synchronize()
    attempts = torch.zeros(repeat, dtype=torch.float64, device=device.device())
    for i in range(repeat):
        dist.barrier()
        begun = time.perf_counter()
        fn()
        device.synchronize()
        attempts[i] = time.perf_counter() - begun
    dist.all_reduce(attempts, op=dist.ReduceOp.MAX)
    return float(attempts.min())


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    # random bits, not constants: power, and with it the clock of a GPU, depends on the data
    return torch.randn(*shape, device=device.device()).to(dtype)


def matmul_flops(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """FLOP/s of one matrix product [rows, inner] x [inner, columns]."""
    a, b = _random(rows, inner, dtype=dtype), _random(columns, inner, dtype=dtype)
    return 2 * rows * inner * columns / slowest_seconds(lambda: a @ b.t())


def training_matmul_flops(work: Workload, dtype: torch.dtype) -> float:
    """FLOP/s over the four linears of a layer, forward, input gradient and weight gradient, weighted by their work."""
    S, h, q, f = work.local_tokens, work.model.hidden_size, work.q_width, work.mlp_width
    shapes = [(h, q + 2 * work.kv_width), (q, h), (h, 2 * f), (f, h)]
    tensors = [(_random(S, k, dtype=dtype), _random(n, k, dtype=dtype), _random(S, n, dtype=dtype)) for k, n in shapes]

    def one_layer() -> None:
        for x, w, g in tensors:
            torch.matmul(x, w.t())
            torch.matmul(g, w)
            torch.matmul(g.t(), x)

    return 3 * 2 * S * sum(k * n for k, n in shapes) / slowest_seconds(one_layer)


def attention_flops(work: Workload, dtype: torch.dtype, name: str = "auto") -> tuple[float, float]:
    """FLOP/s of the kernel called `name`, forward and backward, over the steps of its ring (visible pairs count).

    One step is the causal tile of the own block, all others are full tiles of all queries and half the keys.
    """
    shard = work.shard
    S, D = shard.tokens, shard.head_dim
    kernel = kernels.select(name, device.device(), dtype, D, D**-0.5, tokens=S)
    q, dout = (_random(1, S, shard.heads, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    k, v = (_random(1, S, shard.kv_heads, D, dtype=dtype).transpose(1, 2) for _ in range(2))
    steps = max(1, work.layout.cp // work.inner)
    seconds = [0.0, 0.0]
    for keys, causal, times in ((S, True, 1), (S // 2, False, steps - 1)):
        if times:
            k_, v_ = k[:, :, :keys], v[:, :, :keys]
            out, lse = kernel.forward(q, k_, v_, causal)
            seconds[0] += times * slowest_seconds(partial(kernel.forward, q, k_, v_, causal))
            seconds[1] += times * slowest_seconds(partial(kernel.backward, dout, Attended(q, k_, v_, out, lse), causal))
    flops = steps * 4 * shard.heads * D * S * (S + 1) / 2
    return flops / seconds[0], 2.5 * flops / seconds[1]


def fastest_attention(work: Workload, dtype: torch.dtype) -> tuple[str, tuple[float, float]]:
    """The CUDA kernel that takes least time forward and backward, and its FLOP/s; auto where there is no choice."""
    if not device.on_cuda() or work.model.head_dim > kernels_cuda.CudnnFlash.max_head_dim:
        return "auto", attention_flops(work, dtype)
    found = {name: attention_flops(work, dtype, name) for name in kernels.on_this_gpu()}
    return min(found.items(), key=lambda kernel: 1 / kernel[1][0] + 2.5 / kernel[1][1])


def copy_bytes_per_second(size: int) -> float:
    """Bytes read and written per second by a copy inside device memory."""
    a = _random(size // 4, dtype=torch.float32)
    b = torch.empty_like(a)
    return 2 * size / slowest_seconds(lambda: b.copy_(a))


def elementwise_bytes_per_second(work: Workload, dtype: torch.dtype) -> float:
    """Bytes per second of the layer's own norm and gating, counted as `planning.duration` counts them."""
    from types import SimpleNamespace

    model, S = work.model, work.local_tokens
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    norm = RMSNorm(config, model.hidden_size).to(device.device())
    f = work.mlp_width
    x, gated = _random(S, model.hidden_size, dtype=dtype), _random(S, 2 * f, dtype=dtype)

    @torch.no_grad()
    def layer() -> None:
        norm(x)
        gate, up = gated.chunk(2, -1)
        torch.nn.functional.silu(gate) * (up + 0.0)

    wide = 1.0 if dtype == torch.bfloat16 else 1.5
    counted = wide * (NORM_FORWARD * x.numel() + GATED_FORWARD * S * f)
    return counted / slowest_seconds(layer)


def host_device_bytes_per_second(size: int) -> float:
    """Bytes per second from pinned host memory to the device (a memory copy on the CPU)."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.on_cuda())
    there = torch.empty(size, dtype=torch.uint8, device=device.device())
    return size / slowest_seconds(lambda: there.copy_(host, non_blocking=True))


def flows(send_to: dict[int, int], sizes: Sequence[int] = SIZES) -> Line:
    """Time of messages that travel at the same time, by size.

    Args:
        send_to: sender -> receiver; a rank sends at most one message and receives at most one.
        sizes: bytes, smallest first.
    """
    rank = dist.get_rank()
    target = send_to.get(rank)
    source = {b: a for a, b in send_to.items()}.get(rank)
    seconds = []
    sizes = [size * (16 if device.on_cuda() else 1) for size in sizes]
    for size in sizes:
        out = torch.zeros(size, dtype=torch.uint8, device=device.device())
        back = torch.empty_like(out)

        def move(out: torch.Tensor = out, back: torch.Tensor = back) -> None:
            ops = [dist.P2POp(dist.isend, out, target)] if target is not None else []
            ops += [dist.P2POp(dist.irecv, back, source)] if source is not None else []
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()

        seconds.append(slowest_seconds(move))
    return fit_line(sizes, seconds)


def fit_line(sizes: list[int], seconds: list[float]) -> Line:
    """Latency from the smallest message, bandwidth from the two largest."""
    rate = (sizes[-1] - sizes[-2]) / max(seconds[-1] - seconds[-2], 1e-12)
    return Line(max(seconds[0] - sizes[0] / rate, 0.0), rate)


def reduce_scatter_cost(size: int) -> float:
    """Time of a reduce-scatter over all ranks, relative to an all-gather of the same tensor."""
    n = dist.get_world_size()
    if n == 1:
        return 1.0
    whole = torch.zeros(size // 4 // n * n, device=device.device())
    part = torch.zeros(whole.numel() // n, device=device.device())
    gather = slowest_seconds(lambda: dist.all_gather_into_tensor(whole, part), repeat=5)
    scatter = slowest_seconds(lambda: dist.reduce_scatter_tensor(part, whole), repeat=5)
    return scatter / gather


def storage_bytes_per_second(folder: Path, size: int = 2**26) -> float:
    """Bytes per second at which all ranks together write and sync files in `folder`."""
    import os

    path = folder / f".calibrate-{dist.get_rank()}"
    data = os.urandom(size)

    def write() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    seconds = slowest_seconds(write, repeat=1)
    path.unlink()
    return size * dist.get_world_size() / seconds


def measure(base: ClusterConfig, work: Workload, gpus_per_node: int, folder: Path) -> ClusterConfig:
    """Cluster facts of the machine this runs on, measured with the shapes of `work`.

    Args:
        base: facts that cannot be measured here (power, memory reserve) are taken from it.
        work: the run whose local shapes are measured.
        gpus_per_node: ranks of one node; they are consecutive.
        folder: where checkpoints will be written.

    Returns:
        `base` with every fact that could be measured replaced.
    """
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    world = dist.get_world_size()
    nodes = world // gpus_per_node
    large = 8192 if device.on_cuda() else 1024
    peaks = {d: matmul_flops(large, large, large, d) for d in (torch.bfloat16, torch.float32)}
    linear = training_matmul_flops(work, dtype)
    kernel, (forward, backward) = fastest_attention(work, dtype)
    # CPU kernels may beat a plain matrix product: the best of all that was seen counts
    peaks[dtype] = max(peaks[dtype], linear, forward, backward)
    stream = copy_bytes_per_second(2**30 if device.on_cuda() else 2**26)
    element = elementwise_bytes_per_second(work, dtype)
    here = f"{world} ranks, {device_name()}"

    def measured(value: float, how: str) -> Fact:
        return Fact(float(f"{value:.4g}"), "measured", f"{how}; {here}")

    product = f"best product, {large} cubed or training shapes"
    bf16 = measured(peaks[torch.bfloat16] / 1e12, product)
    fp32 = measured(peaks[torch.float32] / 1e12, product)
    limits = {
        "peak_bf16_tflops": limit(base, device_name(), "peak_bf16_tflops", bf16),
        "peak_fp32_tflops": limit(base, device_name(), "peak_fp32_tflops", fp32),
        "memory_gbs": limit(base, device_name(), "memory_gbs", measured(stream / 1e9, "copy, bytes read and written")),
    }
    peak = limits["peak_bf16_tflops" if dtype == torch.bfloat16 else "peak_fp32_tflops"].value * 1e12
    bandwidth = limits["memory_gbs"].value * 1e9

    found: dict[str, Fact] = {
        "nodes": measured(nodes, "as started"),
        "gpus_per_node": measured(gpus_per_node, "as started"),
        "gpus_per_pair": Fact(1, "assumed", "pairs are not told apart"),
        "nodes_per_leaf": Fact(nodes, "assumed", "leaf switches are not told apart"),
        **limits,
        "gemm_efficiency": measured(linear / peak, f"linears of a layer at {work.local_tokens} tokens"),
        "attention_forward_efficiency": measured(
            forward / peak, f"tiles of a ring of {work.layout.cp}, {work.local_tokens} local tokens"
        ),
        "attention_backward_efficiency": measured(
            backward / peak, f"tiles of a ring of {work.layout.cp}, {work.local_tokens} local tokens"
        ),
        "memory_efficiency": measured(element / bandwidth, "norm and gating of a layer, counted bytes"),
        "host_device_gbs": measured(host_device_bytes_per_second(2**26) / 1e9, "pinned copy"),
        "storage_gbs": measured(storage_bytes_per_second(folder) / 1e9, "64 MiB per rank, synced"),
        "spine_share": Fact(1, "assumed", "no spine told apart"),
        **_wires(gpus_per_node, nodes, measured),
    }
    host = device.host_memory_gib()
    found["host_memory_gib"] = measured(host, "as the kernel reports it")
    if not device.on_cuda():
        found["memory_gib"] = measured(host / gpus_per_node, "an equal share of the host")
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        found["memory_gib"] = measured(total / 2**30, "as CUDA reports it")
    known: dict[str, Any] = {name: fact for name, fact in found.items() if name in base.facts()}
    this = replace(base, gpu=device_name(), device=device.device().type, attention_kernel=kernel, **known)
    return with_whole_shares(this, work.precision)


def _wires(gpus_per_node: int, nodes: int, measured: Callable[[float, str], Fact]) -> dict[str, Fact]:
    """Flows as rings make them: never back to where something comes from, except to see what that costs."""
    found: dict[str, Fact] = {}
    world = gpus_per_node * nodes
    pairs = {r: r + 1 for r in range(0, world - 1, 2) if (r + 1) // gpus_per_node == r // gpus_per_node}
    if pairs:
        inside = flows(pairs, SIZES_INSIDE)
        both = flows(pairs | {b: a for a, b in pairs.items()}, SIZES_INSIDE)
        found["node_gbs"] = found["pair_gbs"] = measured(inside.bytes_per_second / 1e9, "to a neighbour in the node")
        found["node_latency_us"] = measured(inside.latency_s * 1e6, "4 KiB to a neighbour in the node")
        share = min(1.0, both.bytes_per_second / inside.bytes_per_second)
        found["exchange_share"] = measured(share, "two ranks to each other, against one direction")
    if nodes > 1:

        def across(lanes: int) -> dict[int, int]:
            hops = [(node, lane) for node in range(nodes) for lane in range(gpus_per_node - lanes, gpus_per_node)]
            # to the next lane of the next node: the last rank of a node sends to the first of the next, as in a ring
            return {n * gpus_per_node + i: (n + 1) % nodes * gpus_per_node + (i + 1) % gpus_per_node for n, i in hops}

        one, every = flows(across(1)), flows(across(gpus_per_node))
        ends = {n * gpus_per_node + gpus_per_node - 1: (n + 1) * gpus_per_node for n in range(0, nodes - 1, 2)}
        mutual = flows(ends | {b: a for a, b in ends.items()})
        share = min(1.0, mutual.bytes_per_second / one.bytes_per_second)
        found["network_exchange_share"] = measured(share, "two ranks on two nodes to each other, against one hop")
        found["nic_gbs"] = measured(one.bytes_per_second / 1e9, "one ring hop out of every node")
        found["network_latency_us"] = measured(one.latency_s * 1e6, "4 KiB to the next node")
        together = gpus_per_node * every.bytes_per_second / one.bytes_per_second
        found["nics_per_node"] = measured(max(1.0, together), "all ranks of a node at once, against one")
    found["reduce_scatter_cost"] = measured(
        reduce_scatter_cost(2**26 if device.on_cuda() else 2**22), "reduce-scatter against all-gather, all ranks"
    )
    return found


def device_name() -> str:
    """What the device is called."""
    if device.on_cuda():
        return torch.cuda.get_device_name()
    import platform

    return f"CPU rank ({platform.machine()}, torch {torch.__version__})"
