"""What is this machine? Asks the driver, the kernel, Slurm and the installed packages; nothing is changed.

Every source may be missing (no driver, no lspci, a container that hides /sys): what could not be asked is named in
`not_told`, so that "no finding" is never taken for "nothing wrong".
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from megalong.machine.gpus import FIELDS, Gpu, parse_q, parse_query
from megalong.machine.pci import Iommu, PciTree, iommu_of, parse_lspci
from megalong.machine.slurm_node import SlurmNode, parse_nodes
from megalong.machine.topo import Links, parse_matrix, parse_p2p

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "nvidia-dali-cuda130",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
    "flash-attn",
    "transformers",
    "triton",
)
PEER_MEMORY = ("nvidia_peermem", "nv_peer_mem")
"""Kernel modules through which a network interface reaches GPU memory; newer kernels can use DMA-BUF instead."""
ANSWER_S = 20


@dataclass(frozen=True)
class Inventory:
    """One node, as far as it tells."""

    host: str = ""
    kernel: str = ""
    cpu: str = ""
    cores: int = 0
    """That this process may use."""
    numa_nodes: int = 1
    host_memory_gib: float = 0.0
    shm_gib: float | None = None
    """Size of /dev/shm."""
    memlock_kib: int | None = None
    """Memory that may be pinned; None: no limit."""
    container: str | None = None
    """docker, podman, enroot, kubernetes, ...; None: none seen."""
    gpus: tuple[Gpu, ...] = ()
    driver: dict[str, str] = field(default_factory=dict)
    """Driver Version and CUDA Version, as `nvidia-smi -q` says."""
    links: Links = field(default_factory=lambda: Links({}, {}))
    p2p: dict[tuple[str, str], str] = field(default_factory=dict)
    """(GPU, GPU) -> a key of `topo.P2P`."""
    peer_access: bool | None = None
    """Whether CUDA lets every GPU read every other one's memory; None: fewer than two, or not asked."""
    pci: PciTree = field(default_factory=lambda: PciTree((), 0, False))
    iommu: Iommu = field(default_factory=lambda: Iommu((), 0, 0, ()))
    infiniband: tuple[str, ...] = ()
    """Names below /sys/class/infiniband."""
    verbs: bool = False
    """Whether /dev/infiniband can be opened from here."""
    peer_memory: tuple[str, ...] = ()
    """Of `PEER_MEMORY`, those that are loaded."""
    slurm: SlurmNode | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    """Name -> version; None: not installed."""
    libraries: dict[str, str] = field(default_factory=dict)
    """What torch was built with, or finds: CUDA, cuDNN, NCCL."""
    nccl_settings: dict[str, str] = field(default_factory=dict)
    """NCCL_* of this environment."""
    not_told: tuple[str, ...] = ()
    """What could not be asked, and why."""


def take() -> Inventory:
    """Ask this machine."""
    silent: list[str] = []

    def ask(*command: str) -> str:
        if shutil.which(command[0]) is None:
            silent.append(f"{command[0]} is not here")
            return ""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            silent.append(f"{' '.join(command)}: {type(error).__name__}")
            return ""
        if done.returncode:
            told = (done.stderr or done.stdout).strip().splitlines()
            silent.append(f"{' '.join(command)}: {told[0] if told else f'exit code {done.returncode}'}")
            return ""
        return done.stdout

    gpus = parse_query(ask("nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv"))
    common, links, p2p = {}, "", ""
    if gpus:
        common = parse_q(ask("nvidia-smi", "-q"))[0]
        links, p2p = ask("nvidia-smi", "topo", "-m"), ask("nvidia-smi", "topo", "-p2p", "r")
    pci = parse_lspci(ask("lspci", "-vvv"))
    if pci.hidden and not pci.ports:
        silent.append("lspci -vvv: capabilities are shown to root alone, so ACS is not known (sudo lspci -vvv)")
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    slurm = parse_nodes(ask("scontrol", "show", "node", node, "--oneliner"))
    types = [_read(path) for path in sorted(Path("/sys/kernel/iommu_groups").glob("*/type"))]
    libraries, peer_access = _libraries(silent)
    lock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    from megalong.runtime.device import host_memory_gib

    return Inventory(
        host=platform.node(),
        kernel=platform.release(),
        cpu=_processor(),
        cores=len(os.sched_getaffinity(0)),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        host_memory_gib=host_memory_gib(),
        shm_gib=shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").is_dir() else None,
        memlock_kib=None if lock == resource.RLIM_INFINITY else lock // 1024,
        container=container_of(dict(os.environ), _read("/proc/1/cgroup"), Path("/.dockerenv").exists()),
        gpus=tuple(gpus),
        driver={key: common[key] for key in ("Driver Version", "CUDA Version") if key in common},
        links=parse_matrix(links),
        p2p=parse_p2p(p2p),
        peer_access=peer_access,
        pci=pci,
        iommu=iommu_of(_read("/proc/cmdline"), _names("/sys/class/iommu"), types),
        infiniband=tuple(_names("/sys/class/infiniband")),
        verbs=any(os.access(path, os.R_OK | os.W_OK) for path in Path("/dev/infiniband").glob("uverbs*")),
        peer_memory=tuple(m for m in PEER_MEMORY if m in _read("/proc/modules").split()),
        slurm=slurm[0] if slurm else None,
        packages={name: _version(name) for name in PACKAGES},
        libraries=libraries,
        nccl_settings={k: v for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")},
        not_told=tuple(silent),
    )


def container_of(env: dict[str, str], cgroup: str, dockerenv: bool) -> str | None:
    """The kind of container that a process is in; None where nothing speaks for one.

    Args:
        cgroup: /proc/1/cgroup.
        dockerenv: whether /.dockerenv is there.
    """
    if "KUBERNETES_SERVICE_HOST" in env or "kubepods" in cgroup:
        return "kubernetes"
    if any(key.startswith("ENROOT_") for key in env) or "PYXIS_ROOT" in env:
        return "enroot"
    if "APPTAINER_CONTAINER" in env or "SINGULARITY_CONTAINER" in env:
        return "apptainer"
    if env.get("container"):  # podman, systemd-nspawn and others set it
        return env["container"]
    return "docker" if dockerenv or "docker" in cgroup else None


def _libraries(silent: list[str]) -> tuple[dict[str, str], bool | None]:
    import torch

    found = {"torch": str(torch.__version__)}
    if torch.version.cuda:
        found["CUDA of torch"] = torch.version.cuda
    if torch.backends.cudnn.is_available():
        number = torch.backends.cudnn.version() or 0
        found["cuDNN"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    if not torch.cuda.is_available():
        silent.append("torch sees no CUDA device")
        return found, None
    with contextlib.suppress(Exception):  # a build without NCCL
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return found, all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _names(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in Path(folder).iterdir())
    except OSError:
        return []
