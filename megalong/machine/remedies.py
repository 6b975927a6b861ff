"""What of this machine stops or slows a cluster without NVLink, and what helps? Says it, with a source; sets nothing.

Pure functions of an `Inventory` and of a log that NCCL wrote. What the log shows counts more than what the inventory
lets one fear: a bridge with ACS under GPUs whose traffic NCCL carries by P2P at full rate is worth a note only.
"""

from __future__ import annotations

from megalong.machine.finding import KERNEL, NCCL_ENV, NCCL_GUIDE, NOTE, SLOWS, STOPS, Finding
from megalong.machine.inventory import Inventory
from megalong.machine.nccl_log import NcclLog, kind
from megalong.machine.surroundings import surroundings
from megalong.machine.topo import P2P


def findings(machine: Inventory, log: NcclLog | None = None, gpus_per_node: int | None = None) -> list[Finding]:
    """Everything found, the gravest first.

    Args:
        log: of a run on these GPUs with NCCL_DEBUG=INFO.
        gpus_per_node: ranks of a node in that run; tells connections inside a node from those between nodes.
    """
    found = [
        *_peer_access(machine, log),
        *_acs(machine, log),
        *_iommu(machine),
        *_numa(machine),
        *_rdma(machine, log),
        *_transport(machine, log, gpus_per_node),
        *surroundings(machine),
    ]
    return sorted(found, key=lambda f: (STOPS, SLOWS, NOTE).index(f.weight))


def _peer_access(machine: Inventory, log: NcclLog | None) -> list[Finding]:
    refused = {word for word in machine.p2p.values() if word != "OK"}
    by_log = log is not None and log.connections and log.kinds().get("SHM", 0) > 0 and "P2P" not in log.kinds()
    if machine.links.nvlink or not (refused or machine.peer_access is False or by_log):
        return []
    why = ", ".join(f"{word}: {P2P.get(word, word)}" for word in sorted(refused)) or "CUDA refuses it"
    if not refused and machine.peer_access is not False:
        why = "NCCL goes through host memory although the driver allows peer access"
    mend = "Look for a BIOS switch (ACS off, Above 4G Decoding and Resizable BAR on). "
    if "GNS" in refused:
        mend = "This kind of GPU has none: no setting of yours changes that. "
    return [
        Finding(
            "no P2P between GPUs",
            SLOWS,
            f"GPUs do not reach one another's memory over PCIe ({why}); NCCL bounces through host memory.",
            f"{mend}Measure the host way with and without NCCL_SHM_USE_CUDA_MEMCPY=1 (copy engines; faster on some "
            "machines, slower or stuck on others) and plan with the measured cluster file.",
            f"{NCCL_GUIDE}; https://github.com/NVIDIA/nccl/issues/922; https://github.com/NVIDIA/nccl/issues/1298",
        )
    ]


def _acs(machine: Inventory, log: NcclLog | None) -> list[Finding]:
    ports = machine.pci.redirecting
    if not ports or len(machine.gpus) < 2 or machine.links.nvlink:
        return []
    addresses = [port.address for port in ports]
    shown = ", ".join(addresses[:6]) + (f" and {len(addresses) - 6} more" if len(addresses) > 6 else "")
    bound = machine.peer_access is not False and not any(word != "OK" for word in machine.p2p.values())
    return [
        Finding(
            "ACS on PCIe bridges",
            STOPS if bound else SLOWS,
            f"ACS sends peer-to-peer traffic up to the root complex on {len(ports)} bridges ({shown}): P2P is slow, "
            "returns wrong data, or NCCL hangs.",
            "Switch ACS off in the BIOS; or on the kernel's command line, for the bridges above GPUs: "
            f"pci=disable_acs_redir={';'.join(addresses[:2])}{';...' if len(addresses) > 2 else ''}; or until the next "
            f"boot, as root: setpci -s {addresses[0]} ECAP_ACS+0x6.w=0000. Virtual machines then lose their isolation.",
            f"{NCCL_GUIDE}; {KERNEL} (pci=disable_acs_redir); https://github.com/NVIDIA/nccl/issues/2079",
        )
    ]


def _iommu(machine: Inventory) -> list[Finding]:
    if not machine.iommu.in_the_way or not machine.gpus:
        return []
    vendor = "amd_iommu" if any(u.startswith("ivhd") for u in machine.iommu.units) else "intel_iommu"
    told = " ".join(machine.iommu.parameters) or "nothing about it on the kernel's command line"
    return [
        Finding(
            "IOMMU in the way",
            STOPS if len(machine.gpus) > 1 and not machine.links.nvlink else SLOWS,
            f"The IOMMU translates the addresses of {machine.iommu.translated} device groups ({told}): traffic between "
            "GPUs, and between GPUs and network interfaces, goes over the root complex; NCCL hangs on some boards.",
            f"Boot with iommu=pt (passed through), or {vendor}=off where nothing on the host needs it.",
            f"{NCCL_GUIDE}; {KERNEL} (iommu=); https://github.com/NVIDIA/nccl/issues/257",
        )
    ]


def _numa(machine: Inventory) -> list[Finding]:
    links = machine.links
    found = []
    far = links.far_neighbours()
    least = len({links.numa.get(g) for g in links.gpus}) - 1
    if not links.nvlink and len(far) > max(1, least):
        pairs = ", ".join(f"{a}-{b}" for a, b in far)
        found.append(
            Finding(
                "neighbours on different NUMA nodes",
                SLOWS,
                f"{len(far)} of {len(links.gpus) - 1} neighbouring GPUs are joined across sockets ({pairs}); rings "
                "visit GPUs in this order.",
                "Order GPUs so that those of one socket are consecutive: CUDA_VISIBLE_DEVICES, or "
                "CUDA_DEVICE_ORDER=PCI_BUS_ID.",
                "https://docs.nvidia.com/cuda/cuda-c-programming-guide/ (CUDA environment variables); nvidia-smi topo",
            )
        )
    distant = [gpu for gpu in links.gpus if links.nearest_nic(gpu) == "SYS"]
    if distant:
        found.append(
            Finding(
                "GPUs far from every network interface",
                NOTE,
                f"{', '.join(distant)}: the nearest interface is on another NUMA node; NCCL then does not use "
                "GPUDirect RDMA unless told to.",
                "An interface on each socket; NCCL_NET_GDR_LEVEL=SYS can be tried and measured.",
                f"{NCCL_ENV} (NCCL_NET_GDR_LEVEL)",
            )
        )
    return found


def _rdma(machine: Inventory, log: NcclLog | None) -> list[Finding]:
    without = log is not None and (bool(log.gdr_disabled) or log.kinds().get("NET/IB", 0) > 0)
    with_it = log is not None and log.kinds().get("NET/IB/GDRDMA", 0) > 0
    likely = bool(machine.infiniband and machine.gpus and not machine.peer_memory)
    if with_it or not (without or likely):
        return []
    told = "NCCL uses the network without GPUDirect RDMA" if without else "No module for GPUDirect RDMA is loaded"
    inside = ""
    if machine.container:
        inside = (
            f" Inside this container ({machine.container}) the devices must be there too: "
            "MELLANOX_VISIBLE_DEVICES=all and no ENROOT_RESTRICT_DEV=y under enroot, --device=/dev/infiniband and "
            "--ulimit memlock=-1 under docker."
        )
    return [
        Finding(
            "GPUDirect RDMA missing",
            SLOWS,
            f"{told}: every message between nodes is copied through host memory.",
            "On the host: modprobe nvidia-peermem, or the open kernel modules with DMA-BUF (Linux 5.12 or later)."
            f"{inside}",
            f"{NCCL_GUIDE}; https://github.com/NVIDIA/pyxis/issues/117",
        )
    ]


def _transport(machine: Inventory, log: NcclLog | None, gpus_per_node: int | None) -> list[Finding]:
    if log is None or not log.connections:
        return []
    found = []
    per_node = gpus_per_node or len(machine.gpus) or 1
    inside = {via for (a, b), via in log.connections.items() if a // per_node == b // per_node}
    between = {via for (a, b), via in log.connections.items() if a // per_node != b // per_node}
    if any(kind(via).startswith("NET") for via in inside):
        found.append(
            Finding(
                "network inside a node",
                STOPS,
                f"GPUs of one node talk over the network ({', '.join(sorted(inside))}): neither P2P nor shared memory.",
                "Let the ranks of a node share /dev/shm and the process namespace (docker: --ipc=host; kubernetes: one "
                "pod per node), and unset NCCL_SHM_DISABLE.",
                f"{NCCL_ENV} (NCCL_SHM_DISABLE); https://github.com/NVIDIA/nccl/issues/797",
            )
        )
    if machine.infiniband and any(kind(via) == "NET/Socket" for via in between):
        found.append(
            Finding(
                "sockets instead of RDMA",
                STOPS,
                f"NCCL uses TCP between nodes although {', '.join(machine.infiniband)} are here.",
                "Give the container /dev/infiniband and libibverbs, unset NCCL_IB_DISABLE, and name the interfaces "
                "with NCCL_IB_HCA.",
                f"{NCCL_ENV} (NCCL_IB_HCA); https://github.com/NVIDIA/nccl/issues/952",
            )
        )
    return found
