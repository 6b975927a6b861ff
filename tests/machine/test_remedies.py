"""What kills clusters without NVLink is found, with what helps and its source; a sound machine is left alone."""

import dataclasses

import pytest

from megalong.machine.gpus import Gpu, parse_query
from megalong.machine.inventory import Inventory, container_of, take
from megalong.machine.nccl_log import NcclLog, parse_nccl
from megalong.machine.pci import iommu_of, parse_lspci
from megalong.machine.remedies import NOTE, STOPS, Finding, findings
from megalong.machine.slurm_node import parse_nodes
from megalong.machine.topo import parse_matrix, parse_p2p
from tests.machine import recordings

L40S = tuple(parse_query(recordings.CSV_L40S))
SOUND = Inventory(
    gpus=L40S * 4,
    links=parse_matrix(recordings.TOPO_PAIRS),
    p2p=parse_p2p(recordings.P2P_HEALTHY),
    peer_access=True,
    shm_gib=64.0,
    pci=parse_lspci(recordings.LSPCI_OFF),
    iommu=iommu_of(recordings.CMDLINE_PT, ["ivhd0"], ["identity"]),
    infiniband=("mlx5_0",),
    verbs=True,
    peer_memory=("nvidia_peermem",),
)


def found(log: NcclLog | None = None, **change: object) -> dict[str, Finding]:
    return {f.name: f for f in findings(dataclasses.replace(SOUND, **change), log, 8)}  # type: ignore[arg-type]


def test_nothing_is_said_of_a_sound_machine() -> None:
    assert found() == {}
    # an interface and ranks of two sockets: only the two connections between nodes take the network
    assert found(parse_nccl(recordings.NCCL_GDR.replace("2[0]", "10[0]").replace("3[1]", "11[1]"))) == {}


NO_P2P = {"p2p": parse_p2p(recordings.P2P_5090), "peer_access": False}
ACS = {"pci": parse_lspci(recordings.LSPCI_AMD)}
TRANSLATED = {"iommu": iommu_of("ro quiet", ["dmar0"], ["DMA-FQ", "DMA-FQ"])}


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (NO_P2P, "no P2P between GPUs", "GPU not supported"),
        (ACS, "ACS on PCIe bridges", "00:01.2"),
        (TRANSLATED, "IOMMU in the way", "iommu=pt"),
        ({"peer_memory": ()}, "GPUDirect RDMA missing", "modprobe nvidia-peermem"),
        ({"peer_memory": (), "container": "enroot"}, "GPUDirect RDMA missing", "MELLANOX_VISIBLE_DEVICES=all"),
        (
            {"verbs": False, "container": "docker"},
            "network interfaces that cannot be opened",
            "--device=/dev/infiniband",
        ),
        ({"shm_gib": 0.0625}, "small /dev/shm", "--shm-size=1g"),
        ({"memlock_kib": 8192}, "little memory may be pinned", "8192 KiB"),
        ({"nccl_settings": {"NCCL_P2P_DISABLE": "1"}}, "NCCL switched down by the environment", "P2P"),
        ({"slurm": parse_nodes(recordings.SCONTROL)[0]}, "Slurm does not use this node", "IDLE+DRAIN"),
        ({"links": parse_matrix(recordings.TOPO_4090)}, "GPUs far from every network interface", "GPU4, GPU5"),
        ({"gpus": (Gpu("NVIDIA H100", "01:00.0", mig=True),)}, "MIG is on", "nvidia-smi -mig 0"),
        (
            {"gpus": (Gpu("NVIDIA L40S", "01:00.0", link_width=8, link_width_max=16),)},
            "narrow PCIe slots",
            "x8 of x16",
        ),
    ],
)
def test_each_killer_is_named_with_a_remedy_and_its_source(change: dict, name: str, says: str) -> None:
    finding = found(**change)[name]
    assert says in finding.what + finding.remedy
    assert "http" in finding.source or "nvidia-smi" in finding.source


def test_acs_stops_a_machine_that_uses_p2p_and_only_slows_one_that_cannot() -> None:
    name = "ACS on PCIe bridges"
    assert found(**ACS)[name].weight == STOPS
    assert found(**ACS, **NO_P2P)[name].weight != STOPS
    assert "ECAP_ACS+0x6.w=0000" in found(**ACS)[name].remedy


def test_nvlink_makes_bridges_and_peer_access_over_pcie_beside_the_point() -> None:
    words = dict.fromkeys(SOUND.links.words, "NV18")
    links = dataclasses.replace(SOUND.links, words=words)
    assert found(links=links, **ACS, **NO_P2P) == {}


def test_gpus_dealt_out_over_sockets_are_noticed() -> None:
    links = parse_matrix(recordings.TOPO_4090)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    place = {f"GPU{old}": f"GPU{new}" for new, old in enumerate(order)} | {"NIC0": "NIC0"}
    dealt = dataclasses.replace(
        links,
        words={(place[a], place[b]): w for (a, b), w in links.words.items()},
        numa={place[g]: n for g, n in links.numa.items()},
    )
    assert "neighbours on different NUMA nodes" not in found(links=links)
    finding = found(links=dealt)["neighbours on different NUMA nodes"]
    assert "7 of 7 neighbouring GPUs" in finding.what


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (recordings.NCCL_NO_GDR, "GPUDirect RDMA missing", "NCCL uses the network without"),
        (recordings.NCCL_DISABLED, "GPUDirect RDMA missing", "NCCL uses the network without"),
        (recordings.NCCL_SOCKET, "sockets instead of RDMA", "mlx5_0"),
        (recordings.NCCL_SHM, "no P2P between GPUs", "although the driver allows"),
        (recordings.NCCL_GDR, "network inside a node", "NET/IB/2/GDRDMA"),  # ranks 0 to 3 are one node of 8 here
    ],
)
def test_the_log_of_nccl_counts_more_than_what_the_machine_promises(text: str, name: str, says: str) -> None:
    finding = found(parse_nccl(text))[name]
    assert says in finding.what


def test_what_stops_stands_first() -> None:
    weights = [f.weight for f in findings(dataclasses.replace(SOUND, **ACS, slurm=parse_nodes(recordings.SCONTROL)[0]))]
    assert weights[0] == STOPS
    assert weights[-1] == NOTE


@pytest.mark.parametrize(
    ("env", "cgroup", "file", "kind"),
    [
        ({}, "0::/init.scope\n", False, None),
        ({}, "0::/\n", True, "docker"),
        ({"ENROOT_ROOTFS": "/x"}, "", False, "enroot"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "", True, "kubernetes"),
        ({"container": "podman"}, "", False, "podman"),
    ],
)
def test_the_kind_of_container_is_seen(env: dict, cgroup: str, file: bool, kind: str | None) -> None:
    assert container_of(env, cgroup, file) == kind


def test_this_machine_can_be_asked_and_says_what_it_does_not_tell() -> None:
    here = take()
    assert here.cores >= 1
    assert here.host_memory_gib > 0
    assert here.packages["torch"]
    assert bool(here.gpus) != any("nvidia-smi" in line for line in here.not_told)
    assert all(isinstance(f, Finding) for f in findings(here))
