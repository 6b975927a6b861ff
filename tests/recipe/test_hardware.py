"""A cluster that is not the machine is refused with both values; `cluster=auto` is the machine. Devices are data."""

import dataclasses
import sys
from pathlib import Path

import pytest

from megalong import pretrain
from megalong.config.cluster import ClusterConfig, Fact, card, to_yaml
from megalong.recipe import hardware
from megalong.recipe.command_line import parse
from megalong.recipe.compose import _tree, _typed
from megalong.recipe.folders import CONF
from megalong.recipe.hardware import Machine, check_cluster, differences, known_cluster, with_cluster
from megalong.recipe.overrides import read
from megalong.recipe.resolve import run_of
from megalong.runtime import launch
from megalong.runtime.errors import ConfigError
from megalong.runtime.launch import Process, ranks_per_node

L40S = Machine("NVIDIA L40S", 8, 44.4, 960.0, ranks=8, world_size=8)
H100 = Machine("NVIDIA H100 80GB HBM3", 8, 79.2, 2000.0, ranks=8, world_size=8)
H200 = Machine("NVIDIA H200", 1, 139.8, 128.0)
A100 = Machine("NVIDIA A100-SXM4-40GB", 4, 39.4, 500.0, ranks=4, world_size=4)
FULL = run_of(["+stage=65k"]).config
MINI = run_of(["+stage=65k", "+scale=mini"]).config


def test_names_of_one_card_agree_and_those_of_two_do_not() -> None:
    assert card("NVIDIA H100 80GB HBM3") == card("NVIDIA H100 SXM 80GB") == "H100"
    assert card("NVIDIA A100-SXM4-40GB") == card("NVIDIA A100-SXM4-80GB") == "A100"
    names = ["NVIDIA H100", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA L40", "NVIDIA L40S", "GH200"]
    assert len({card(name) for name in [*names, "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX 4090"]}) == 9


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"world_size": 512}, []),
        ({"devices": 1}, []),  # Slurm shows each of the eight tasks one device
        ({"gpu": "NVIDIA H200"}, ["its devices are NVIDIA L40S, and here is NVIDIA H200"]),
        ({"devices": 4, "ranks": 4}, ["it has 8 devices per node, and this node has 4"]),
        ({"ranks": 4}, []),  # one node, half of its devices
        ({"ranks": 4, "world_size": 64}, ["and 4 ranks were started on this one"]),
        ({"memory_gib": 22.0}, ["a device of it has 44.5 GiB, and one here 22.0 GiB"]),
        ({"memory_gib": 80.0}, ["a device of it has 44.5 GiB, and one here 80.0 GiB"]),
        ({"world_size": 520}, ["it has 512 devices in all, and 520 ranks were started"]),
    ],
)
def test_every_difference_is_named_with_both_values(change: dict, says: list[str]) -> None:
    here = dataclasses.replace(L40S, **{"world_size": 4, **change} if change.get("ranks") == 4 else change)
    found = differences(FULL.cluster, here)
    assert len(found) == len(says)
    for clause, words in zip(found, says, strict=True):
        assert words in clause


def test_the_default_cluster_on_other_devices_is_refused_and_auto_is_offered() -> None:
    with pytest.raises(ConfigError, match=r"NVIDIA L40S, and here is NVIDIA H200.*8 devices.*has 1;.*cluster=auto"):
        check_cluster(FULL, H200)
    assert check_cluster(FULL, L40S) == []


def test_the_trainer_compares_before_it_plans_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "+stage=65k"])
    monkeypatch.setattr(hardware, "this_machine", lambda world_size: H200)
    with pytest.raises(ConfigError, match="cluster=l40s-64x8 is not this machine"):
        pretrain.main(Process(0, 8, 0, "single"))


def test_a_rehearsal_on_another_kind_of_device_is_told_and_a_full_run_for_cpu_ranks_is_refused() -> None:
    assert check_cluster(MINI, None) == []
    assert "cluster=auto reads it" in check_cluster(MINI, H200)[0]
    assert "on CPU ranks" in check_cluster(FULL, None)[0]
    with pytest.raises(ConfigError, match="describes CPU ranks, and here is NVIDIA H200"):
        check_cluster(dataclasses.replace(FULL, cluster=MINI.cluster), H200)


@pytest.mark.parametrize(
    ("here", "base"),
    [
        (L40S, "l40s-1x8"),
        (dataclasses.replace(L40S, world_size=32), "l40s-4x8"),
        (dataclasses.replace(L40S, world_size=400), "l40s-64x8"),
        (H100, "h100-8"),
        (dataclasses.replace(H100, devices=3, ranks=3, world_size=6), "h100-8"),
        (H200, "h200-1"),
        (A100, None),
    ],
)
def test_auto_is_the_machine_with_the_facts_of_the_known_card(
    here: Machine, base: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    given = with_cluster(read(["+stage=65k", "cluster=auto", "cluster.storage_gbs.value=7"]), here)
    config = _typed(_tree(given, parse([]))[0])
    cluster = config.cluster
    assert check_cluster(config, here) == []
    assert (cluster.name, cluster.gpu, cluster.storage_gbs.value) == ("auto", here.gpu, 7)
    assert cluster.devices >= here.world_size > cluster.devices - here.devices
    assert (cluster.memory_gib.value, cluster.memory_gib.tag) == (here.memory_gib, "measured")
    assert cluster.gpus_per_node.value % cluster.gpus_per_pair.value == 0
    assert known_cluster(here.gpu, int(cluster.nodes.value)) == base
    said = capsys.readouterr().err
    if base is None:
        assert "A100-SXM4-40GB is in no file of conf/cluster" in said
        assert cluster.peak_bf16_tflops.tag == "assumed"
    else:
        assert said == ""
        assert cluster.peak_bf16_tflops == run_of(["+stage=65k", f"cluster={base}"]).config.cluster.peak_bf16_tflops


def cluster_of(here: Machine, *words: str, added: tuple[str, ...] = ()) -> ClusterConfig:
    given = with_cluster(read(["+stage=65k", "cluster=auto", *words], added), here, added)
    line = parse(["--config-dir", added[0]] if added else [])
    return _typed(_tree(given, line)[0]).cluster


def test_nodes_of_a_job_count_before_anything_is_started_in_it() -> None:
    alone = dataclasses.replace(L40S, ranks=1, world_size=1)
    assert cluster_of(alone).nodes.value == 1
    given = cluster_of(dataclasses.replace(alone, nodes=4)).nodes
    assert (given.value, given.tag, given.source) == (4, "measured", "as given by Slurm or torchrun")
    assert cluster_of(dataclasses.replace(L40S, world_size=32, nodes=2)).nodes.value == 4  # ranks need more


def test_a_measured_file_of_the_card_comes_before_an_assumed_one(tmp_path: Path) -> None:
    measured = dataclasses.replace(
        run_of(["+stage=65k", "cluster=l40s-1x8"]).config.cluster,
        name="z-ours",
        gemm_efficiency=Fact(0.61, "measured", "products"),
    )
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "z-ours.yaml").write_text(to_yaml(measured))
    added = (str(tmp_path), str(CONF))
    assert known_cluster("NVIDIA L40S", 1) == "l40s-1x8"
    assert known_cluster("NVIDIA L40S", 1, added) == "z-ours"
    assert known_cluster("NVIDIA L40S", 64, added) == "l40s-64x8"
    assert cluster_of(L40S, added=added).gemm_efficiency.value == 0.61


def test_a_cluster_file_is_taken_by_its_path_and_a_setting_stays_the_last_word(tmp_path: Path) -> None:
    path = tmp_path / "a cluster, 'ours'.yaml"
    ours = dataclasses.replace(
        run_of(["+stage=65k"]).config.cluster, name="ours", node_gbs=Fact(3.25, "measured", 'with "P2P"; 8 ranks: {x}')
    )
    path.write_text(to_yaml(ours))
    found = run_of(["+stage=65k", f"cluster={path}", "cluster.nic_gbs=7"]).config.cluster
    assert found == dataclasses.replace(ours, nic_gbs=dataclasses.replace(ours.nic_gbs, value=7.0))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml is no cluster file"):
        run_of(["+stage=65k", "cluster=nowhere.yaml"])


@pytest.mark.parametrize(
    ("env", "nodes"),
    [
        ({"GROUP_WORLD_SIZE": "2", "SLURM_JOB_NUM_NODES": "4"}, 2),
        ({"SLURM_JOB_NUM_NODES": "4"}, 4),
        ({"SLURM_STEP_NUM_NODES": "3", "SLURM_JOB_NUM_NODES": "4"}, 3),
        ({}, 1),
    ],
)
def test_nodes_are_what_the_launcher_or_slurm_says(env: dict[str, str], nodes: int) -> None:
    assert launch.nodes(env) == nodes


def test_without_a_device_auto_is_the_cluster_of_cpu_ranks() -> None:
    assert run_of(["+stage=65k", "+scale=mini", "+cluster=auto"], 1).config.cluster == MINI.cluster


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x16)"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        ({}, None),
    ],
)
def test_ranks_of_a_node_are_what_the_launcher_says(env: dict[str, str], ranks: int | None) -> None:
    assert ranks_per_node(env) == ranks
