"""What does context parallelism cost beside a single attention kernel? Ratios, each from one run.

    python benchmarks/attention.py                     # all rows of this machine
    python benchmarks/attention.py two_ranks --repeats 5

two_ranks   two ranks of one thread each, p2p, 16k tokens in all, against one rank: times faster, forward + backward.
ring_of_32  the compute of one rank of a ring of 32, blocks fed from memory, against one kernel call on as many pairs.
documents   64 documents per sequence against none: the share of the saved work that is saved time.
gpu         ring_of_32 at 32k local tokens, 32/8 heads of 128, bf16, for flash, cuDNN and FlashAttention 3 (where it
            is), with TFLOP/s; needs a GPU.

Each figure is the median over repeats of a ratio of times measured next to each other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import megalong
from megalong.attention import kernels, ring, traffic
from megalong.attention.algorithms import Algorithm
from megalong.attention.tiles import Documents, pairs
from megalong.attention.zigzag import shard
from megalong.doctor.ring_speed import compute_seconds, problem, ring_compute, seconds
from megalong.runtime import fused
from megalong.runtime.ranks import RankPool

CPU_HEADS, CPU_KV_HEADS, CPU_HEAD_DIM = 8, 2, 64


def step(attend: Algorithm, tensors: list[torch.Tensor], documents: Documents) -> None:
    """Forward and backward of one attention layer."""
    q, k, v, dout = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    kernel = kernels.select("auto", q.device, q.dtype, q.shape[-1], q.shape[-1] ** -0.5)
    out = attend(q, k, v, documents, kernel, torch.float32)
    torch.autograd.grad(out, (q, k, v), dout)


def _two_against_one(tokens: int, dtype: torch.dtype, repeats: int) -> list[float]:
    """On each of two ranks: the ratios of one rank's time to two ranks' time."""
    cpu = torch.device("cpu")
    full = problem(tokens, CPU_HEADS, CPU_KV_HEADS, CPU_HEAD_DIM, dtype, cpu)
    mine = [shard(x, 2, dist.get_rank()) for x in full]
    together, alone = Algorithm("p2p", dist.group.WORLD), Algorithm("p2p", None)
    small = [shard(x[:1024], 2, dist.get_rank()) for x in full]
    step(together, small, None)  # warm-up: connections, kernels
    ratios = []
    for _ in range(repeats):
        dist.barrier()
        two = torch.tensor(seconds(lambda: step(together, mine, None), cpu))
        dist.all_reduce(two, op=dist.ReduceOp.MAX)
        one = seconds(lambda: step(alone, full, None), cpu) if dist.get_rank() == 0 else 0.0
        dist.barrier()  # the other rank sleeps here while rank 0 works alone
        ratios.append(one / two.item())
    return ratios


def two_ranks(repeats: int, tokens: int) -> dict[str, Any]:
    """Speed-up of two single-threaded CPU ranks over one."""
    with RankPool(threads=1) as pool:
        found = {
            name: pool.run(_two_against_one, 2, tokens, dtype, repeats, timeout_s=3600)[0]
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        }
    return {
        "tokens": tokens,
        **{f"times_faster_{name}": round(statistics.median(r), 3) for name, r in found.items()},
        "all": {name: [round(x, 3) for x in r] for name, r in found.items()},
        "wanted": {"fp32": 1.9, "bf16": 1.8},
    }


def ring_of_32(repeats: int, tokens: int) -> dict[str, Any]:
    """One CPU thread at 4k local tokens."""
    torch.set_num_threads(1)
    shape = (tokens // 4, CPU_HEADS, CPU_KV_HEADS, CPU_HEAD_DIM)
    found = {
        name: ring_compute(32, shape, dtype, torch.device("cpu"), "cpu_flash", repeats)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return {"local_tokens": tokens // 4, **found, "wanted": {"forward": 0.95, "backward": 1.0}}


def documents(repeats: int, tokens: int) -> dict[str, Any]:
    """One CPU thread, one rank: 64 documents of random lengths against none."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    starts = (0, *sorted((torch.randperm(tokens - 1, generator=generator)[:63] + 1).tolist()))
    saved = 1 - sum(map(pairs, ring.plan(tokens, 1, 0, starts))) / (tokens * (tokens + 1) / 2)
    tensors = problem(tokens, CPU_HEADS, CPU_KV_HEADS, CPU_HEAD_DIM, torch.float32, torch.device("cpu"))
    alone, cpu = Algorithm("p2p", None), torch.device("cpu")
    step(alone, [x[:512] for x in tensors], None)
    ratios = []
    for _ in range(repeats):
        without = compute_seconds(lambda: step(alone, tensors, None), cpu)
        within = compute_seconds(lambda: step(alone, tensors, starts), cpu)
        ratios.append(within / without)
    time_left = statistics.median(ratios)
    return {
        "tokens": tokens,
        "work_saved": round(saved, 4),
        "time_saved": round(1 - time_left, 4),
        "share_of_what_the_work_allows": round((1 - time_left) / saved, 3),
        "times_faster": round(1 / time_left, 2),
        "times_less_work": round(1 / (1 - saved), 2),
        "wanted": {"share_of_what_the_work_allows": 0.5},
    }


def gpu(repeats: int, tokens: int) -> dict[str, Any]:
    """One NVIDIA GPU at 32k local tokens of Llama-3-8B's heads, bf16."""
    if not torch.cuda.is_available():
        return {"open": "no GPU on this machine"}
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    rates = [2 * 8192**3 / seconds(lambda: a @ a, device) / 1e12 for _ in range(20)]
    matmul = statistics.median(rates)
    shape = (32768, 32, 8, 128)
    hop = traffic.forward_bytes("p2p", traffic.Shard(*shape), 2)["ring_kv"]
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "matmul_tflops": round(matmul, 1),
        "megabytes_per_hop": hop / 2**20,
        "wanted": {"forward": 0.95, "backward": 0.93},
    }
    fused.choose("auto", False)
    for name in kernels.on_this_gpu():
        row = ring_compute(32, shape, torch.bfloat16, device, name, repeats)
        row["forward_share_of_matmul"] = round(row["forward_tflops"] / matmul, 3)
        row["backward_share_of_matmul"] = round(row["backward_tflops"] / matmul, 3)
        found[name] = row
    return found


ROWS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "two_ranks": two_ranks,
    "ring_of_32": ring_of_32,
    "documents": documents,
    "gpu": gpu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; none: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all; smaller only to try the script")
    given = parser.parse_args()
    found: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads seen by torch",
        "torch": torch.__version__,
        "megalong": megalong.__version__,
        "repeats": given.repeats,
    }
    for name in given.rows or ROWS:
        found[name] = ROWS[name](given.repeats, given.tokens)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
