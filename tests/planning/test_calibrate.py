"""Measurements become cluster facts: a line through transfer times, a file that the planner reads back."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megalong.config.cluster import ClusterConfig, load_cluster
from megalong.planning import calibrate
from megalong.planning.workload import workload_of
from megalong.recipe.compose import compose
from megalong.runtime.ranks import RankPool


def test_a_line_gives_back_latency_and_rate() -> None:
    sizes = list(calibrate.SIZES)
    found = calibrate.fit_line(sizes, [1e-4 + size / 2e9 for size in sizes])
    assert found.latency_s == pytest.approx(1e-4)
    assert found.bytes_per_second == pytest.approx(2e9)


def measure(folder: str) -> ClusterConfig:
    config = compose(["+stage=65k", "+scale=mini", "topology.cp=4", "topology.dp=1"], 4)
    return calibrate.measure(config.cluster, workload_of(config), 2, Path(folder))


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
    path = tmp_path / "mine.yaml"
    path.write_text(calibrate.to_yaml(cluster))
    again = load_cluster(path)
    assert {n: f.value for n, f in again.facts().items()} == pytest.approx(
        {n: f.value for n, f in cluster.facts().items()}, rel=1e-5
    )
    assert again.device == "cpu"


def flows_are_timed_only_where_they_go() -> float:
    line = calibrate.flows({0: 1})
    assert dist.get_world_size() == 2
    return line.bytes_per_second


def test_a_single_flow_has_a_rate_on_both_ends(ranks: RankPool) -> None:
    a, b = ranks.run(flows_are_timed_only_where_they_go, 2)
    assert a == b > 0
