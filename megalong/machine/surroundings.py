"""What around the wires slows or stops a run: container limits, PCIe slots, Slurm's opinion, leftover NCCL settings."""

from __future__ import annotations

from megalong.machine.finding import NCCL_ENV, NCCL_GUIDE, NOTE, SLOWS, STOPS, Finding
from megalong.machine.inventory import Inventory

SMALL_SHM_GIB = 1.0
"""What NCCL's guide gives a container (`--shm-size=1g`)."""


def surroundings(machine: Inventory) -> list[Finding]:
    """Everything found, in no order."""
    return [*_container(machine), *_slots(machine), *_slurm(machine), *_settings(machine)]


def _container(machine: Inventory) -> list[Finding]:
    found = []
    if machine.gpus and machine.shm_gib is not None and machine.shm_gib < SMALL_SHM_GIB:
        found.append(
            Finding(
                "small /dev/shm",
                STOPS,
                f"/dev/shm has {machine.shm_gib:.2f} GiB: NCCL's host buffers and data workers do not fit.",
                "docker: --shm-size=1g --ulimit memlock=-1, or --ipc=host.",
                f"{NCCL_GUIDE} (shared memory)",
            )
        )
    if machine.infiniband and machine.gpus and not machine.verbs:
        found.append(
            Finding(
                "network interfaces that cannot be opened",
                STOPS if machine.container else SLOWS,
                f"{', '.join(machine.infiniband)} are in the kernel, but /dev/infiniband cannot be opened from here.",
                "docker: --device=/dev/infiniband; enroot: MELLANOX_VISIBLE_DEVICES=all; else the group that owns it.",
                "https://github.com/NVIDIA/pyxis/issues/117",
            )
        )
    if machine.infiniband and machine.memlock_kib is not None and machine.memlock_kib < 2**20:
        found.append(
            Finding(
                "little memory may be pinned",
                STOPS,
                f"ulimit -l is {machine.memlock_kib} KiB: RDMA cannot register its buffers.",
                "ulimit -l unlimited (docker: --ulimit memlock=-1; Slurm: PropagateResourceLimitsExcept=MEMLOCK).",
                f"{NCCL_GUIDE}; https://slurm.schedmd.com/faq.html (memlock)",
            )
        )
    return found


def _slots(machine: Inventory) -> list[Finding]:
    found = []
    narrow = [g for g in machine.gpus if g.link_width and g.link_width_max and g.link_width < g.link_width_max]
    if narrow:
        lanes = ", ".join(f"{g.bus}: x{g.link_width} of x{g.link_width_max}" for g in narrow)
        found.append(
            Finding(
                "narrow PCIe slots",
                SLOWS,
                f"GPUs run on fewer lanes than they have ({lanes}).",
                "Another slot, a reseated card or riser, or the slot's bifurcation in the BIOS.",
                "nvidia-smi --help-query-gpu (pcie.link.width.current, .max)",
            )
        )
    if any(g.mig for g in machine.gpus):
        found.append(
            Finding(
                "MIG is on",
                STOPS,
                "GPUs are cut into instances, which have no P2P and no NCCL between them.",
                "nvidia-smi -mig 0, by whoever runs the machine.",
                "https://docs.nvidia.com/datacenter/tesla/mig-user-guide/",
            )
        )
    kinds = sorted({g.name for g in machine.gpus})
    if len(kinds) > 1:
        found.append(
            Finding(
                "mixed GPUs",
                NOTE,
                f"{' and '.join(kinds)}: every step waits for the slower.",
                "Use one kind.",
                "nvidia-smi -L",
            )
        )
    return found


def _slurm(machine: Inventory) -> list[Finding]:
    node, found = machine.slurm, []
    if node is not None and not node.usable:
        found.append(
            Finding(
                "Slurm does not use this node",
                NOTE,
                f"{node.name} is {node.state}{f' ({node.reason})' if node.reason else ''}.",
                "scontrol update, once the reason is gone.",
                "https://slurm.schedmd.com/scontrol.html",
            )
        )
    if node is not None and node.gpus and machine.gpus and node.gpus != len(machine.gpus):
        found.append(
            Finding(
                "GPUs that Slurm and the driver count differently",
                NOTE,
                f"Slurm has {node.gpus}, and {len(machine.gpus)} are seen here.",
                "A job sees what it asked for (--gpus-per-node); outside one, a card has fallen off the bus.",
                "https://slurm.schedmd.com/gres.html",
            )
        )
    return found


SWITCHED_OFF = {"NCCL_P2P_DISABLE": "P2P", "NCCL_SHM_DISABLE": "shared memory", "NCCL_IB_DISABLE": "InfiniBand"}


def _settings(machine: Inventory) -> list[Finding]:
    off = [name for name in SWITCHED_OFF if machine.nccl_settings.get(name, "0") not in ("", "0")]
    if not off:
        return []
    told = ", ".join(f"{name}={machine.nccl_settings[name]}" for name in off)
    return [
        Finding(
            "NCCL switched down by the environment",
            SLOWS,
            f"{told}: no {', no '.join(SWITCHED_OFF[n] for n in off)}.",
            "Unset them where they are left from a search for a fault.",
            NCCL_ENV,
        )
    ]
