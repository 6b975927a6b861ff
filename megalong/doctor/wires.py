"""What do the wires carry, which way do messages take, and do sums arrive whole?

Bandwidths are nccl-tests' busbw (its doc/PERFORMANCE.md): bytes of the result over seconds, times 2 (n - 1) / n for an
all-reduce and (n - 1) / n for gather and scatter, which is what each wire carries. On GPUs NCCL writes a log
(NCCL_DEBUG=INFO); what it says of transports is judged by `machine.remedies`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalong.doctor.part import Round
from megalong.doctor.result import FAIL, NOT_RUN, NOTE, PASS, Check, held
from megalong.machine.finding import STOPS
from megalong.machine.nccl_log import parse_nccl
from megalong.machine.remedies import findings
from megalong.runtime import device

SIZES = {"cuda": 2**28, "cpu": 2**24}
"""Bytes of a collective's result."""


def sums_arrive() -> dict[str, bool]:
    """Whether each collective gives exactly what it must: whole numbers, another one in every place and rank."""
    rank, world, here = dist.get_rank(), dist.get_world_size(), device.device()
    count = 4096
    places = torch.arange(count, device=here, dtype=torch.float32)

    def of(r: int, factor: int = 1) -> torch.Tensor:
        return places * factor + r

    total = places * world + world * (world - 1) / 2
    found = {}
    x = of(rank)
    dist.all_reduce(x)
    found["all-reduce"] = torch.equal(x, total)
    whole = torch.empty(world * count, device=here)
    dist.all_gather_into_tensor(whole, of(rank))
    found["all-gather"] = torch.equal(whole, torch.cat([of(r) for r in range(world)]))
    part = torch.empty(count, device=here)
    dist.reduce_scatter_tensor(part, torch.cat([of(rank, r + 1) for r in range(world)]))
    found["reduce-scatter"] = torch.equal(part, places * (rank + 1) * world + world * (world - 1) / 2)
    got = torch.empty(world * count, device=here)
    dist.all_to_all_single(got, torch.cat([of(rank, r + 1) for r in range(world)]))
    found["all-to-all"] = torch.equal(got, torch.cat([of(r, rank + 1) for r in range(world)]))
    back = torch.empty_like(places)
    ops = [
        dist.P2POp(dist.isend, of(rank), (rank + 1) % world),
        dist.P2POp(dist.irecv, back, (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    found["ring hop"] = torch.equal(back, of((rank - 1) % world))
    return found


def carried(size: int) -> dict[str, float]:
    """GB/s that each wire carries in three collectives of `size` bytes, on the slowest rank."""
    from megalong.machine.calibrate import slowest_seconds

    world, here = dist.get_world_size(), device.device()
    count = size // 4 // world * world
    whole, part = torch.zeros(count, device=here), torch.zeros(count // world, device=here)
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "all-reduce": (lambda: dist.all_reduce(whole), 2 * (world - 1) / world),
        "all-gather": (lambda: dist.all_gather_into_tensor(whole, part), (world - 1) / world),
        "reduce-scatter": (lambda: dist.reduce_scatter_tensor(part, whole), (world - 1) / world),
    }
    return {name: factor * count * 4 / slowest_seconds(fn, repeat=5) / 1e9 for name, (fn, factor) in work.items()}


def neighbours() -> dict[str, float]:
    """GB/s and microseconds from a rank to the next, all pairs at once, and both directions against one."""
    from megalong.machine.calibrate import SIZES_INSIDE, flows

    pairs = {r: r + 1 for r in range(0, dist.get_world_size() - 1, 2)}
    one, both = flows(pairs, SIZES_INSIDE), flows(pairs | {b: a for a, b in pairs.items()}, SIZES_INSIDE)
    return {
        "gbs": one.bytes_per_second / 1e9,
        "latency_us": one.latency_s * 1e6,
        "both_ways": both.bytes_per_second / one.bytes_per_second,
    }


def on_ranks(size: int) -> dict[str, Any]:
    """Everything, as a task for all ranks."""
    return {"exact": sums_arrive(), "busbw": carried(size), "hop": neighbours()}


def run(visit: Round) -> list[Check]:
    """All of it; with one GPU there is no wire to measure."""
    world = visit.ranks.count
    if world < 2:
        return [Check("wires", NOT_RUN, "one device: nothing to send to")]
    logs = visit.out / "logs" / "nccl"
    logs.mkdir(parents=True, exist_ok=True)
    env = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET,P2P,SHM,GRAPH", "NCCL_DEBUG_FILE": f"{logs}/%h.%p"}
    found = visit.ranks.run(on_ranks, world, SIZES[visit.ranks.device], env=env)
    wrong = sorted({name for rank in found for name, good in rank["exact"].items() if not good})
    exact = f"{len(found[0]['exact'])} kinds, {world} ranks" if not wrong else f"wrong: {', '.join(wrong)}"
    checks = [held("collectives give what they must", not wrong, exact, "bit for bit")]
    size = SIZES[visit.ranks.device] / 2**20
    checks += [
        Check(f"{name} busbw, {size:.0f} MiB", NOTE, f"{gbs:.2f} GB/s") for name, gbs in found[0]["busbw"].items()
    ]
    hop = found[0]["hop"]
    checks.append(Check("to the next rank", NOTE, f"{hop['gbs']:.2f} GB/s, {hop['latency_us']:.0f} us"))
    checks.append(Check("both directions against one", NOTE, f"{hop['both_ways']:.2f} of the rate each"))
    return checks + (_transports(visit, logs) if visit.on_gpu else [])


def _transports(visit: Round, logs: Path) -> list[Check]:
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(logs.glob("*")))
    visit.log = parse_nccl(text)
    kinds = visit.log.kinds()
    if not kinds:
        return [Check("transport", NOT_RUN, f"NCCL wrote no connection into {logs}")]
    visit.findings = findings(visit.machine, visit.log, visit.ranks.count)
    stopped = [f.name for f in visit.findings if f.weight == STOPS]
    told = ", ".join(f"{count} by {kind}" for kind, count in sorted(kinds.items()))
    state = FAIL if "network inside a node" in stopped else PASS
    return [Check("transport of NCCL's connections", state, told, "P2P or SHM inside a node")]
