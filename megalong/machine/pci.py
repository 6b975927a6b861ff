"""What stands between two PCIe devices? Reads `lspci -vvv`, the kernel's command line, and its IOMMU groups."""

from __future__ import annotations

import re
from dataclasses import dataclass

REDIRECTS = ("ReqRedir", "CmpltRedir")
"""The ACS bits that send peer-to-peer traffic up to the root complex (PCI Express Base Specification 6.12)."""
TRANSLATED = ("DMA", "DMA-FQ")
"""Types of an IOMMU group whose addresses are translated; `identity` is passed through (kernel's
Documentation/ABI/testing/sysfs-kernel-iommu_groups)."""


@dataclass(frozen=True)
class Port:
    """A PCI device that has Access Control Services."""

    address: str
    """Such as 00:01.1, with a domain where there is more than one."""
    name: str
    """What lspci calls it."""
    bridge: bool
    on: tuple[str, ...]
    """Bits of ACSCtl that are set."""

    @property
    def redirects(self) -> bool:
        """Whether traffic between its devices makes a detour over the root complex."""
        return self.bridge and any(bit in self.on for bit in REDIRECTS)


@dataclass(frozen=True)
class PciTree:
    """What lspci says of ACS."""

    ports: tuple[Port, ...]
    """Those whose ACS control could be read."""
    devices: int
    hidden: bool
    """Whether capabilities were kept from whoever asked: lspci shows them to root alone."""

    @property
    def redirecting(self) -> list[Port]:
        return [port for port in self.ports if port.redirects]


_HEAD = re.compile(r"((?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) (.+)", re.IGNORECASE)


def parse_lspci(text: str) -> PciTree:
    """Read `lspci -vvv`."""
    ports: list[Port] = []
    address, name, devices, hidden = "", "", 0, False
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            address, name, devices = head[1], re.sub(r" \(prog-if.*| \(rev \w+\)$", "", head[2]), devices + 1
            continue
        hidden |= "Capabilities: <access denied>" in line
        if address and line.strip().startswith("ACSCtl:"):
            on = tuple(word[:-1] for word in line.split(":", 1)[1].split() if word.endswith("+"))
            ports.append(Port(address, name, "bridge" in name.lower().split(":")[0], on))
    return PciTree(tuple(ports), devices, hidden)


@dataclass(frozen=True)
class Iommu:
    """Whether device addresses are translated."""

    units: tuple[str, ...]
    """Names below /sys/class/iommu: dmar0 (Intel), ivhd0 (AMD), smmu3.* (Arm); none: no IOMMU is in use."""
    translated: int
    """Groups whose type is DMA or DMA-FQ."""
    passed_through: int
    """Groups of type identity."""
    parameters: tuple[str, ...]
    """What the kernel's command line says of IOMMU and ACS."""

    @property
    def in_the_way(self) -> bool:
        """Whether any device's addresses are translated."""
        return bool(self.units) and self.translated > 0


def kernel_parameters(cmdline: str) -> tuple[str, ...]:
    """Words of /proc/cmdline that decide how PCIe traffic goes."""
    keys = ("iommu", "intel_iommu", "amd_iommu", "iommu.passthrough", "iommu.strict", "pcie_acs_override", "pcie_aspm")
    words = cmdline.split()
    return tuple(w for w in words if w.split("=")[0] in keys or (w.startswith("pci=") and "acs" in w))


def iommu_of(cmdline: str, units: list[str], group_types: list[str]) -> Iommu:
    """What the kernel tells, put together.

    Args:
        cmdline: /proc/cmdline.
        units: names below /sys/class/iommu.
        group_types: contents of /sys/kernel/iommu_groups/*/type.
    """
    types = [t.strip() for t in group_types]
    translated = sum(t in TRANSLATED for t in types)
    return Iommu(tuple(sorted(units)), translated, types.count("identity"), kernel_parameters(cmdline))
