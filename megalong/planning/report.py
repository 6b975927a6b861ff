"""How is a plan told? To a person as plain text, one screen; to a script as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megalong.config.cluster import ClusterConfig
from megalong.planning.memory import GIB
from megalong.planning.plan import Plan
from megalong.planning.ring import RingRow
from megalong.planning.traffic import step_bytes
from megalong.topology.placement import groups
from megalong.topology.valid import as_overrides


def report(plan: Plan, title: str) -> str:
    """The whole plan as text."""
    return "\n\n".join([_head(plan, title), _memory(plan), _ring(plan), _time(plan), _facts(plan.cluster)])


def _head(plan: Plan, title: str) -> str:
    work, layout, cluster = plan.work, plan.work.layout, plan.cluster
    comm = work.cp_comm_type
    if work.hierarchical_sizes and comm == "a2a+p2p":
        comm += f" {list(work.hierarchical_sizes)}"
    return (
        f"{title}: window {work.seq_length:,} tokens, {work.global_batch_size} sequences per step, {work.steps} steps, "
        f"{work.tokens_per_step * work.steps:,} tokens\n"
        f"{layout} on {layout.world_size} {cluster.gpu} ({plan.placement.nodes} nodes of {cluster.name}), attention "
        f"{comm}, recompute {work.recompute}, {work.precision}"
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    lines = [f"memory of one device, pipeline stage {memory.rank_stage} (GiB)"]
    lines += [
        f"  {name:<34}{size / GIB:8.2f}  {_bar(size / memory.capacity)}"
        for name, size in sorted(memory.terms.items(), key=lambda term: -term[1])
        if size >= 0.005 * GIB or size > 0.001 * memory.total
    ]
    verdict = "fits" if memory.total <= memory.capacity else "DOES NOT FIT"
    lines.append(f"  {'total':<34}{memory.total / GIB:8.2f}  of {memory.capacity / GIB:.1f}: {verdict}")
    host = "fits" if memory.host_per_node <= memory.host_capacity else "DOES NOT FIT"
    lines.append(
        f"  {'host memory of a node':<34}{memory.host_per_node / GIB:8.2f}  of {memory.host_capacity / GIB:.0f}: {host}"
    )
    return "\n".join(lines)


def _bar(share: float) -> str:
    return "#" * max(1, round(40 * share))


def _ring(plan: Plan) -> str:
    layout = plan.work.layout
    if layout.cp == 1:
        return "ring: none, every rank holds whole sequences"
    rings = groups(layout, "cp")
    lines = [f"{len(rings)} context-parallel groups of {layout.cp} ranks; the first: {_path(plan, rings[0])}"]
    if plan.ring:
        lines.append("  direction  hop      hops   MB/hop  GB/s needed  GB/s there  hop ms  hidden ms  exposed ms")
        lines += [
            f"  {row.direction:<10} {row.edge:<6} {row.hops:>6} {row.bytes_per_hop / 1e6:>8.2f} {_needed(row):>12} "
            f"{row.available_gbs:>11.2f} {row.hop_ms:>7.2f} {row.hidden_ms:>10.2f} {row.exposed_ms:>11.2f}"
            for row in plan.ring
        ]
    forward, backward = plan.step.forward, plan.step.backward
    lines.append(
        f"  one attention layer: forward {forward.compute * 1e3:.1f} ms of computing, {forward.travel * 1e3:.1f} ms of "
        f"travel, {forward.exposed * 1e3:.1f} exposed; backward {backward.compute * 1e3:.1f}, "
        f"{backward.travel * 1e3:.1f}, {backward.exposed * 1e3:.1f}"
    )
    return "\n".join(lines)


def _needed(row: RingRow) -> str:
    return f"{row.needed_gbs:.2f}" if row.needed_gbs < 1e4 else "any exposed"


def _path(plan: Plan, ring: Sequence[int]) -> str:
    """Nodes that a ring visits, with the number of its ranks on each."""
    visits: list[list[int]] = []
    for rank in ring:
        node = plan.placement.node(rank)
        if visits and visits[-1][0] == node:
            visits[-1][1] += 1
        else:
            visits.append([node, 1])
    shown = [f"node {node} ({count})" for node, count in visits[:6]]
    return " -> ".join(shown) + (f" -> ... {len(visits) - 6} more" if len(visits) > 6 else "")


def _time(plan: Plan) -> str:
    seconds, use = asdict(plan.step.seconds), plan.use
    lines = ["one optimizer step (seconds)"]
    lines += [
        f"  {name.replace('_', ' '):<34}{value:8.2f}  {_bar(value / plan.step_s)}"
        for name, value in sorted(seconds.items(), key=lambda term: -term[1])
        if value > 0.0005 * plan.step_s
    ]
    lines.append(f"  {'total':<34}{plan.step_s:8.2f}  bottleneck: {plan.bottleneck}")
    lines += [
        f"{other.steps} of {plan.work.steps} steps read sequences of {other.window:,} tokens, packed to the window: "
        f"{other.step.seconds.total:.2f} each"
        for other in plan.shorter
    ]
    lines += [
        f"{use.tokens_per_second_per_gpu:,.0f} tokens/s/GPU (whole steps), MFU {use.mfu:.1%} (model FLOPs: causal "
        f"half, no recompute), HFU {use.hfu:.1%} (executed)",
        f"stage: {plan.wall_s / 60:,.0f} minutes with {plan.work.checkpoints} saves of {plan.checkpoint_s:.0f} s, "
        f"{plan.gpu_hours:,.0f} GPU hours, {plan.kwh:,.0f} kWh at full power",
        f"collective timeout {plan.collective_timeout_s} s, signal {plan.signal_lead_s} s before the end of the job",
    ]
    return "\n".join(lines)


def _facts(cluster: ClusterConfig) -> str:
    by_tag: dict[str, list[str]] = {}
    for name, fact in cluster.facts().items():
        by_tag.setdefault(fact.tag, []).append(name)
    lines = ["what this rests on (sources: output=json, or conf/cluster)"]
    lines += [f"  {tag}: {', '.join(by_tag[tag])}" for tag in ("measured", "spec", "assumed") if tag in by_tag]
    return "\n".join(lines)


def alternatives_table(plans: Sequence[Plan]) -> str:
    """Plans side by side, in the order given."""
    lines = ["  step s  tokens/s/GPU   MFU  GiB of GPU  exposed ring s  fits  layout"]
    lines += [
        f"{p.step_s:>8.2f} {p.use.tokens_per_second_per_gpu:>13,.0f} {p.use.mfu:>5.0%} {p.memory.total / GIB:>11.1f} "
        f"{p.step.seconds.ring:>15.2f}  {'yes' if p.fits else 'no ':<4}  {as_overrides(p.work.layout)} "
        f"train.recompute={p.work.recompute}"
        for p in plans
    ]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan as plain values, for `output=json`. Units are in the keys."""
    work, layout = plan.work, plan.work.layout
    ranks = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        ring = layout.stride("cp")
        base = rank - at.cp * ring
        neighbour = {d: base + (at.cp + d) % layout.cp * ring for d in (-1, 1)}
        ranks.append(
            {
                "rank": rank,
                "node": plan.placement.node(rank),
                "slot": plan.placement.slot(rank),
                **asdict(at),
                "ring_left": neighbour[-1],
                "ring_right": neighbour[1],
                "ring_edge": plan.placement.edge(rank, neighbour[1]) if layout.cp > 1 else "self",
            }
        )
    return {
        "window": work.seq_length,
        "layout": asdict(layout),
        "cp_comm_type": work.cp_comm_type,
        "hierarchical_context_parallel_sizes": work.hierarchical_sizes,
        "global_batch_size": work.global_batch_size,
        "steps": work.steps,
        "tokens": work.tokens_per_step * work.steps,
        "recompute": work.recompute,
        "precision": work.precision,
        "cluster": {
            "name": plan.cluster.name,
            "gpu": plan.cluster.gpu,
            "facts": {name: asdict(fact) for name, fact in plan.cluster.facts().items()},
        },
        "fits": plan.fits,
        "memory_bytes": plan.memory.terms,
        "memory_total_gib": plan.memory.total / GIB,
        "memory_capacity_gib": plan.memory.capacity / GIB,
        "host_memory_gib_per_node": plan.memory.host_per_node / GIB,
        "bytes_sent_per_step": {
            f"stage{s}": {"/".join(k): v for k, v in step_bytes(work, s).items()} for s in {0, layout.pp - 1}
        },
        "ring": [asdict(row) for row in plan.ring],
        "bottleneck": plan.bottleneck,
        "step_seconds": asdict(plan.step.seconds),
        "step_total_s": plan.step_s,
        "shorter": [{"window": s.window, "steps": s.steps, "step_total_s": s.step.seconds.total} for s in plan.shorter],
        "attention_layer": {"forward": asdict(plan.step.forward), "backward": asdict(plan.step.backward)},
        **asdict(plan.use),
        "checkpoint_s": plan.checkpoint_s,
        "wall_minutes": plan.wall_s / 60,
        "gpu_hours": plan.gpu_hours,
        "kwh": plan.kwh,
        "collective_timeout_s": plan.collective_timeout_s,
        "signal_lead_s": plan.signal_lead_s,
        "ranks": ranks,
    }
