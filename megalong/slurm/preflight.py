"""The nodes of a job that are fit to train on, and the order in which ranks go over them.

`nodes.py` makes one report per node; here they are held against what the run needs and against one another. The
decision is a pure function; the command around it writes what slurm/stage.sbatch goes by:

    python -m megalong.slurm.preflight REPORTS --nodes n1=address,n2=address,... --take N --per-node G --out FOLDER ...

Exit codes: 0 `FOLDER/hostfile` has a line per rank and `FOLDER/environment` what ranks need to meet, 2 nothing that
other nodes would mend, 3 the job is to start again without the nodes in `FOLDER/excluded`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR
from megalong.slurm.nodes import NodeReport, read_reports
from megalong.slurm.start import this_start, write_environment

EXIT_OTHER_NODES = 3
SLOW_GPU = 0.8
"""A GPU below this share of the median of all is slow: every step waits for the slowest rank."""
SLOW_LINK = 0.1
"""TCP only shows that a link is far from its speed (a port that came up at 1 Gb/s); GPUs use other paths."""


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


def not_without(
    bad: Sequence[str], excluded: Sequence[str], partition: Sequence[str] | None, needed: int
) -> str | None:
    """Why a job cannot do without its bad nodes; None if it can.

    Args:
        excluded: nodes that earlier starts have left out.
        partition: all nodes that the job could get; None: nobody knows.
        needed: nodes of the job.
    """
    if set(bad) & set(excluded):
        return "a node came back that had been excluded"
    left = len(set(partition or ()) - {*excluded, *bad})
    if partition is not None and left < needed:
        return f"without the bad nodes the partition has {left}, and {needed} are needed"
    return None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split() if path.is_file() else []


def main(arguments: list[str]) -> int:
    """Judge the reports of a job and write what its next steps need.

    Returns:
        exit code.
    """
    parser = argparse.ArgumentParser(prog="preflight")
    parser.add_argument("reports", type=Path)
    parser.add_argument("--nodes", required=True, help="name=address of the job's nodes, joined by commas")
    parser.add_argument("--take", type=int, required=True, help="nodes that the run uses")
    parser.add_argument("--per-node", type=int, required=True, help="ranks, and GPUs, per node")
    parser.add_argument("--out", type=Path, required=True, help="folder of the job's own notes")
    parser.add_argument("--partition", type=Path, help="file with all nodes that the job could get")
    parser.add_argument("--gpus-required", action="store_true")
    for floor in ("gpu", "host", "disk"):
        parser.add_argument(f"--{floor}-gib", type=float, default=0.0)
    options = parser.parse_args(arguments)
    pairs = (pair.partition("=") for pair in options.nodes.split(","))
    addresses = {name: address or name for name, _, address in pairs}
    needs = Needs(options.per_node, options.gpus_required, options.gpu_gib, options.host_gib, options.disk_gib)
    verdict = judge(read_reports(options.reports.read_text(encoding="utf-8")), list(addresses), needs)
    for line in verdict.warnings:
        print(f"preflight: {line}")
    for node, fault in verdict.bad.items():
        print(f"preflight: bad node {node}: {fault}")
    start = this_start()
    if len(verdict.good) >= options.take:
        order = [r.node for r in by_leaf(verdict.good, options.take)]
        hosts = "".join(f"{node}\n" * options.per_node for node in order)
        (options.out / "hostfile").write_text(hosts, encoding="utf-8")
        write_environment(options.out / "environment", start.environment(addresses[order[0]], str(options.out)))
        print(f"preflight: {len(verdict.good)} of {len(addresses)} nodes fit; order {' '.join(order)}")
        return EXIT_OK
    if not verdict.good or len(verdict.bad) > max(1, len(addresses) // 2):
        print("preflight: most nodes fail, so other nodes would not help: mend what they have in common")
        return EXIT_USER_ERROR
    bad, earlier = list(verdict.bad), _lines(options.out / "excluded")
    (options.out / "bad").write_text("".join(f"{node}\n" for node in bad), encoding="utf-8")
    partition = _lines(options.partition) if options.partition else None
    if reason := not_without(bad, earlier, partition, len(addresses)):
        print(start.says(reason))
        return EXIT_USER_ERROR
    excluded = [*earlier, *bad]
    (options.out / "excluded").write_text("".join(f"{node}\n" for node in excluded), encoding="utf-8")
    print(start.says(f"to be started again without {','.join(excluded)}"))
    return EXIT_OTHER_NODES


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
