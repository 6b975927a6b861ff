"""Measurements become cluster facts: a line through transfer times, a file that the planner reads back."""

import dataclasses
from pathlib import Path

import pytest
import torch.distributed as dist

from megalong.config.cluster import (
    SHARES_OF_THE_PEAK,
    ClusterConfig,
    Fact,
    limit,
    load_cluster,
    to_yaml,
    with_whole_shares,
)
from megalong.config.limits import violations
from megalong.machine import calibrate
from megalong.planning.workload import workload_of
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool

MINI_CLUSTER = run_of(["+stage=65k", "+scale=mini"]).config.cluster


def test_a_line_gives_back_latency_and_rate() -> None:
    sizes = list(calibrate.SIZES)
    found = calibrate.fit_line(sizes, [1e-4 + size / 2e9 for size in sizes])
    assert found.latency_s == pytest.approx(1e-4)
    assert found.bytes_per_second == pytest.approx(2e9)


def measure(folder: str) -> ClusterConfig:
    run = run_of(["+stage=65k", "+scale=mini", "topology.cp=4", "topology.dp=1"], 4)
    return calibrate.measure(run.config.cluster, workload_of(run), 2, Path(folder))


def test_ranks_measure_the_same_facts_and_the_planner_reads_them(tmp_path: Path, ranks: RankPool) -> None:
    found = ranks.run(measure, 4, str(tmp_path))
    assert all(other == found[0] for other in found)
    cluster = found[0]
    assert (cluster.nodes.value, cluster.gpus_per_node.value) == (2, 2)
    tags = {name: fact.tag for name, fact in cluster.facts().items()}
    for name in ("peak_bf16_tflops", "gemm_efficiency", "memory_gbs", "node_gbs", "nic_gbs", "exchange_share"):
        assert tags[name] == "measured"
        assert cluster.facts()[name].value > 0
    assert tags["gpu_watts"] == "assumed"  # not measurable here: taken from the cluster it started from
    assert "no specification known" in cluster.peak_bf16_tflops.source
    assert list(violations(cluster)) == []
    cluster = dataclasses.replace(cluster, gpu='a "quoted" name')
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(cluster))
    again = load_cluster(path)
    assert {n: f.value for n, f in again.facts().items()} == pytest.approx(
        {n: f.value for n, f in cluster.facts().items()}, rel=1e-5
    )
    assert (again.device, again.gpu) == ("cpu", cluster.gpu)


def test_a_specified_peak_of_the_same_device_stays_and_measured_products_are_shares_of_it() -> None:
    h200 = run_of(["+stage=65k", "cluster=h200-1"]).config.cluster
    best = Fact(790.0, "measured", "best product")
    peak = limit(h200, "NVIDIA H200", "peak_bf16_tflops", best)
    assert (peak.value, peak.tag) == (989.4, "spec")
    assert "best measured 790" in peak.source
    for base, gpu, found, says in (
        (h200, "NVIDIA A100-SXM4-80GB", best, "no specification known"),  # another card's peak is none
        (MINI_CLUSTER, "CPU rank (x86_64)", best, "no specification known"),
        (h200, "NVIDIA H200", Fact(1100.0, "measured", "x"), "above the specification of 989.4"),
    ):
        kept = limit(base, gpu, "peak_bf16_tflops", found)
        assert (kept.value, kept.tag) == (found.value, "measured")
        assert says in kept.source


def test_no_share_of_a_measured_cluster_is_above_one() -> None:
    quick = dataclasses.replace(MINI_CLUSTER, attention_forward_efficiency=Fact(1.25, "measured", "x"))
    found = with_whole_shares(quick, "bf16")
    assert list(violations(found)) == []
    assert found.peak_tflops == pytest.approx(1.25 * quick.peak_tflops)
    for name in SHARES_OF_THE_PEAK:  # the rates themselves are what was measured
        rate = found.facts()[name].value * found.peak_tflops
        assert rate == pytest.approx(quick.facts()[name].value * quick.peak_tflops)


def flows_are_timed_only_where_they_go() -> float:
    line = calibrate.flows({0: 1})
    assert dist.get_world_size() == 2
    return line.bytes_per_second


def test_a_single_flow_has_a_rate_on_both_ends(ranks: RankPool) -> None:
    a, b = ranks.run(flows_are_timed_only_where_they_go, 2)
    assert a == b > 0
