"""Which nodes of a job are fit to train on, and in which order do ranks go over them?

`megalong/runtime/nodecheck.py` makes one report per node; here they are held against what the run needs and against
one another. The decision is a pure function; the command around it writes what slurm/stage.sbatch goes by:

    python -m megalong.runtime.preflight REPORTS --nodes n1,n2,... --take N --per-node G --out FOLDER ...

Exit codes: 0 `FOLDER/hostfile` is written, 2 nothing that other nodes would mend, 3 `FOLDER/bad` names nodes to leave.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR

EXIT_OTHER_NODES = 3
SLOW_GPU = 0.8
"""A GPU below this share of the median of all is slow: every step waits for the slowest rank."""
SLOW_LINK = 0.1
"""TCP only shows that a link is far from its speed (a port that came up at 1 Gb/s); GPUs use other paths."""


@dataclass(frozen=True)
class Gpu:
    """One GPU as its node sees it."""

    free_gib: float
    total_gib: float
    tflops: float
    """Achieved on a bf16 product."""


@dataclass(frozen=True)
class NodeReport:
    """What a node says of itself."""

    node: str
    topology: str
    """SLURM_TOPOLOGY_ADDR: switches from the top and the node, joined by dots."""
    cuda: bool = False
    """Whether an NVIDIA driver is loaded."""
    gpus: tuple[Gpu, ...] = ()
    gpu_error: str | None = None
    run_dir_error: str | None = None
    """Why run_dir is not the folder that the job uses, or cannot be written."""
    disk_gib: float = 0.0
    """Free for run_dir, and what its checkpoints hold already."""
    host_gib: float = 0.0
    """Host memory that is available."""
    link_gbs: float | None = None
    """GB/s sent to the next node in the job's list; None: no next node, or see link_error."""
    link_error: str | None = None


@dataclass(frozen=True)
class Needs:
    """What every node must have."""

    gpus: int
    """Per node; checked where any node has a driver, or `gpus_required`."""
    gpus_required: bool = False
    gpu_gib: float = 0.0
    """Free on each GPU."""
    host_gib: float = 0.0
    disk_gib: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What follows from all reports."""

    good: list[NodeReport]
    bad: dict[str, str]
    """Node -> reason."""
    warnings: list[str] = field(default_factory=list)


def judge(reports: Sequence[NodeReport], nodes: Sequence[str], needs: Needs) -> Verdict:
    """Decide which nodes are fit.

    Args:
        reports: of the nodes that answered, in any order.
        nodes: all nodes of the job; each one measured its link to the next, the last one to the first.
    """
    by_name = {r.node: r for r in reports}
    cuda = needs.gpus_required or any(r.cuda for r in reports)
    usual = median(speeds) if (speeds := [g.tflops for r in reports for g in r.gpus]) else 0.0
    bad: dict[str, str] = {}
    for node in nodes:
        reason = _fault(by_name[node], needs, cuda, usual) if node in by_name else "did not answer"
        if reason:
            bad[node] = reason
    warnings = _judge_links(by_name, nodes, bad)
    return Verdict([by_name[n] for n in nodes if n not in bad], bad, warnings)


def _fault(report: NodeReport, needs: Needs, cuda: bool, usual: float) -> str | None:
    if report.run_dir_error:
        return report.run_dir_error
    if report.disk_gib < needs.disk_gib:
        return f"{report.disk_gib:.1f} GiB of disk for run_dir, {needs.disk_gib:.1f} needed"
    if report.host_gib < needs.host_gib:
        return f"{report.host_gib:.1f} GiB of host memory available, {needs.host_gib:.1f} needed"
    if not cuda:
        return None
    if report.gpu_error:
        return report.gpu_error
    if len(report.gpus) < needs.gpus:
        return f"{len(report.gpus)} GPUs, {needs.gpus} expected"
    for index, gpu in enumerate(report.gpus):
        if gpu.free_gib < needs.gpu_gib:
            return f"GPU {index}: {gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, {needs.gpu_gib:.1f} needed"
        if gpu.tflops < SLOW_GPU * usual:
            return f"GPU {index}: {gpu.tflops:.1f} TFLOP/s, the median of the job is {usual:.1f}"
    return None


def _judge_links(by_name: dict[str, NodeReport], nodes: Sequence[str], bad: dict[str, str]) -> list[str]:
    """A node both of whose links fail joins `bad`; a single link does not tell which end it is, and is a warning."""
    answered = [n for n in nodes if n in by_name]
    rates = [rate for n in answered if (rate := by_name[n].link_gbs) is not None]
    usual = median(rates) if rates else 0.0
    failing: dict[int, str] = {}
    for i, node in enumerate(nodes):
        report = by_name.get(node)
        if report is None or len(nodes) < 2 or nodes[(i + 1) % len(nodes)] not in by_name:
            continue
        if report.link_error:
            failing[i] = report.link_error
        elif report.link_gbs is not None and report.link_gbs < SLOW_LINK * usual:
            failing[i] = f"{report.link_gbs:.3f} GB/s, the median of the job is {usual:.2f}"
    warnings = []
    for i, why in failing.items():
        before = (i - 1) % len(nodes)
        if len(nodes) > 2 and before in failing and nodes[i] not in bad:
            bad[nodes[i]] = f"link: to {nodes[(i + 1) % len(nodes)]}: {why}; from {nodes[before]}: {failing[before]}"
        warnings.append(f"link {nodes[i]} -> {nodes[(i + 1) % len(nodes)]}: {why}")
    return warnings


def by_leaf(reports: Sequence[NodeReport], take: int) -> list[NodeReport]:
    """`take` nodes in topology order, so that neighbours in rank sit under one switch as far as possible.

    Nodes too many are left out of the smallest leaf, which then no ring has to enter.
    """
    order = sorted(reports, key=lambda r: [natural(part) for part in r.topology.split(".")])
    while len(order) > take:
        members: dict[str, list[NodeReport]] = {}
        for report in order:
            members.setdefault(leaf_of(report), []).append(report)
        order.remove(min(members.values(), key=len)[-1])
    return order


def leaf_of(report: NodeReport) -> str:
    """The switches above a node; empty where Slurm knows no topology."""
    return report.topology.rpartition(".")[0]


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key with n2 before n10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def read_reports(text: str) -> list[NodeReport]:
    """Reports from JSON lines; other lines (warnings of a container start, for one) are left out."""
    found = []
    for line in text.splitlines():
        if not line.startswith('{"node"'):
            continue
        values: dict[str, Any] = json.loads(line)
        values["gpus"] = tuple(Gpu(**gpu) for gpu in values["gpus"])
        found.append(NodeReport(**values))
    return found


def main(arguments: list[str]) -> int:
    """Judge the reports of a job and write the hostfile or the bad nodes.

    Returns:
        exit code.
    """
    parser = argparse.ArgumentParser(prog="preflight")
    parser.add_argument("reports", type=Path)
    parser.add_argument("--nodes", required=True, help="nodes of the job, joined by commas")
    parser.add_argument("--take", type=int, required=True, help="nodes that the run uses")
    parser.add_argument("--per-node", type=int, required=True, help="ranks, and GPUs, per node")
    parser.add_argument("--out", type=Path, required=True, help="folder for hostfile and bad")
    parser.add_argument("--gpus-required", action="store_true")
    for floor in ("gpu", "host", "disk"):
        parser.add_argument(f"--{floor}-gib", type=float, default=0.0)
    options = parser.parse_args(arguments)
    nodes = options.nodes.split(",")
    needs = Needs(options.per_node, options.gpus_required, options.gpu_gib, options.host_gib, options.disk_gib)
    verdict = judge(read_reports(options.reports.read_text(encoding="utf-8")), nodes, needs)
    for line in verdict.warnings:
        print(f"preflight: {line}")
    for node, reason in verdict.bad.items():
        print(f"preflight: bad node {node}: {reason}")
    if len(verdict.good) >= options.take:
        order = by_leaf(verdict.good, options.take)
        hosts = "".join(f"{r.node}\n" * options.per_node for r in order)
        (options.out / "hostfile").write_text(hosts, encoding="utf-8")
        print(f"preflight: {len(verdict.good)} of {len(nodes)} nodes fit; order {' '.join(r.node for r in order)}")
        return EXIT_OK
    if not verdict.good or len(verdict.bad) > max(1, len(nodes) // 2):
        print("preflight: most nodes fail, so other nodes would not help: mend what they have in common")
        return EXIT_USER_ERROR
    (options.out / "bad").write_text("".join(f"{node}\n" for node in verdict.bad), encoding="utf-8")
    return EXIT_OTHER_NODES


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
