"""What tools say of a machine is read as it was printed on real ones (`recordings.py`)."""

import pytest

from megalong.machine import gpus, nccl_log, pci, slurm_node, topo
from tests.machine import recordings


def test_a_matrix_with_tabs_and_an_empty_column_is_read() -> None:
    links = topo.parse_matrix(recordings.TOPO_4090)
    assert (links.gpus, links.nics) == ([f"GPU{i}" for i in range(8)], ["NIC0"])
    assert links.words["GPU3", "GPU4"] == "SYS"
    assert links.words["GPU4", "NIC0"] == "SYS"
    assert links.numa == {f"GPU{i}": "0" if i < 4 else "1" for i in range(8)}
    assert links.between_gpus() == {"PIX": 12, "SYS": 16}
    assert links.far_neighbours() == [("GPU3", "GPU4")]
    assert [links.nearest_nic(g) for g in ("GPU0", "GPU7")] == ["PIX", "SYS"]


@pytest.mark.parametrize(
    ("text", "size", "nvlink"),
    [
        (recordings.TOPO_4090, 4, False),
        (recordings.TOPO_PAIRS, 2, False),
        (recordings.TOPO_FOUR, 2, False),
        (recordings.TOPO_5090, 1, False),
        (recordings.TOPO_V100, 1, False),  # some pairs only, and a row is missing
        ("", 1, False),
    ],
)
def test_gpus_below_one_switch_are_a_pair_of_the_cluster_file(text: str, size: int, nvlink: bool) -> None:
    links = topo.parse_matrix(text)
    assert (links.pair_size(), links.nvlink) == (size, nvlink)


def test_an_old_matrix_names_interfaces_and_no_numa_node() -> None:
    links = topo.parse_matrix(recordings.TOPO_V100)
    assert (links.nics, links.numa) == (["mlx5_0", "mlx5_1"], {})
    assert links.words["GPU2", "mlx5_0"] == "PIX"
    assert links.words["GPU0", "GPU1"] == "NV2"


def test_peer_access_is_read_with_the_word_for_its_absence() -> None:
    assert topo.parse_p2p(recordings.P2P_5090) == {("GPU0", "GPU1"): "GNS", ("GPU1", "GPU0"): "GNS"}
    healthy = topo.parse_p2p(recordings.P2P_HEALTHY)
    assert (len(healthy), set(healthy.values())) == (56, {"OK"})


def test_the_drivers_table_becomes_gpus_whatever_was_asked_for() -> None:
    first, second = gpus.parse_query(recordings.CSV_L40S)
    assert (first.name, first.bus, second.bus, first.driver) == ("NVIDIA L40S", "01:00.0", "91:00.0", "595.71.05")
    assert first.memory_gib == pytest.approx(44.99, abs=0.01)
    assert (first.link_width, first.mig) == (None, False)
    assert gpus.parse_query("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.") == []


def test_the_drivers_long_text_keeps_blocks_apart() -> None:
    common, [gpu] = gpus.parse_q(recordings.SMI_Q_L40S)
    assert common == {"Attached GPUs": "1"}
    assert (gpu["bus"], gpu["Product Name"], gpu["MIG Mode / Current"]) == ("34:00.0", "NVIDIA L40S", "N/A")
    common, [gpu] = gpus.parse_q(recordings.SMI_Q_PRO6000)
    assert (common["Driver Version"], common["CUDA Version"]) == ("580.105.06", "Not Found")
    assert gpu["Clocks Event Reasons / HW Slowdown"] == "Not Active"
    assert gpu["Clocks Event Reasons Counters / SW Power Capping"] == "1202176 us"


def test_acs_is_told_per_bridge() -> None:
    tree = pci.parse_lspci(recordings.LSPCI_AMD + "\n" + recordings.LSPCI_PLX + "\n" + recordings.LSPCI_OFF)
    assert [port.address for port in tree.ports] == ["00:01.2", "0000:02:08.0", "00:00.0"]
    assert [port.address for port in tree.redirecting] == ["00:01.2", "0000:02:08.0"]
    assert tree.ports[0].name == "PCI bridge: Advanced Micro Devices, Inc. [AMD] Starship/Matisse GPP Bridge"
    assert tree.ports[0].on == ("SrcValid", "ReqRedir", "CmpltRedir", "UpstreamFwd")
    assert (tree.devices, tree.hidden) == (4, False)


def test_what_lspci_hides_from_users_is_not_taken_for_acs_off() -> None:
    tree = pci.parse_lspci(recordings.LSPCI_DENIED)
    assert (tree.ports, tree.hidden) == ((), True)


def test_an_iommu_is_in_the_way_where_it_translates() -> None:
    passed = pci.iommu_of(recordings.CMDLINE_PT, ["ivhd0", "ivhd1"], ["identity\n", "identity\n"])
    assert (passed.in_the_way, passed.parameters, passed.passed_through) == (False, ("iommu=pt",), 2)
    assert pci.iommu_of("BOOT_IMAGE=/vmlinuz ro", ["dmar0"], ["DMA-FQ\n", "identity\n"]).in_the_way
    assert not pci.iommu_of("intel_iommu=off", [], []).in_the_way


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (recordings.NCCL_GDR, {"NET/IB/GDRDMA": 3, "P2P": 2}),
        (recordings.NCCL_NO_GDR, {"P2P": 1, "NET/IB": 2}),
        (recordings.NCCL_SOCKET, {"NET/Socket": 1, "P2P": 2}),
        (recordings.NCCL_SHM, {"SHM": 3}),
        (recordings.NCCL_24, {"NET/IB": 1, "P2P": 2}),
        (recordings.NCCL_BUS, {"NET/IB/GDRDMA": 1}),
    ],
)
def test_a_log_of_nccl_tells_the_way_of_every_connection(text: str, kinds: dict[str, int]) -> None:
    assert nccl_log.parse_nccl(text).kinds() == kinds


def test_of_several_channels_the_slowest_counts() -> None:
    mixed = recordings.NCCL_GDR.replace("/3/GDRDMA", "/3") + recordings.NCCL_GDR
    assert nccl_log.parse_nccl(mixed).connections[0, 2] == "NET/IB/3"


def test_a_log_of_nccl_tells_version_settings_and_what_it_does_without() -> None:
    old, disabled, warned = map(
        nccl_log.parse_nccl, (recordings.NCCL_24, recordings.NCCL_DISABLED, recordings.NCCL_WARN)
    )
    assert (old.version, old.settings) == ("2.4.7+cuda10.0", {"NCCL_IB_DISABLE": "0"})
    assert (disabled.network, disabled.gdr_disabled) == ("IB", ("mlx5_0", "mlx5_1"))
    assert (warned.network, warned.warnings) == ("Socket", ("Failed to open libibverbs.so[.1]",))


@pytest.mark.parametrize("text", [recordings.SCONTROL, " ".join(recordings.SCONTROL.split())])
def test_slurm_tells_of_a_node_on_one_line_or_many(text: str) -> None:
    [node] = slurm_node.parse_nodes(text)
    assert (node.name, node.state, node.gpus, node.gpu_type) == (
        "yigou-dev-102-68",
        "IDLE+DRAIN",
        1,
        "nvidia-rtx-3090",
    )
    assert (node.cpus, node.usable) == (8, False)
    assert node.reason == "gres/gpu count reported lower than configured (0 < 1)"


def test_several_nodes_are_told_apart_and_one_without_gpus_has_none() -> None:
    other = recordings.SCONTROL.replace("yigou-dev-102-68", "n2").replace("gpu:nvidia-rtx-3090:1", "(null)")
    other = other.replace("IDLE+DRAIN", "MIXED")
    assert [(n.name, n.gpus, n.usable) for n in slurm_node.parse_nodes(recordings.SCONTROL + other)] == [
        ("yigou-dev-102-68", 1, False),
        ("n2", 0, True),
    ]
