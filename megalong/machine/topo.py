"""How are the GPUs of this node joined? Reads what `nvidia-smi topo -m` and `nvidia-smi topo -p2p` print.

Both are tables of words: a column per GPU (and per network interface), a row per GPU, then columns with processors and
NUMA nodes that may be empty. Newer drivers separate cells by tabs, copies in reports by spaces; words are the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NEAR = ("PIX", "PXB")
"""Ways that stay below one root port: a switch, or several of them."""
FAR = "SYS"
"""A way that leaves the NUMA node, through the wires between the sockets."""
_DEVICE = re.compile(r"(GPU|NIC)\d+|mlx\d+_\w+")


@dataclass(frozen=True)
class Links:
    """Who is how far from whom."""

    words: dict[tuple[str, str], str]
    """(device, device) -> NV18, PIX, PXB, PHB, NODE, SYS; devices are GPU0..., NIC0... (mlx5_0 in old drivers)."""
    numa: dict[str, str]
    """GPU -> NUMA nodes as printed (`0`, `0-1`); without those that the driver does not tell."""

    @property
    def gpus(self) -> list[str]:
        return sorted({a for a, _ in self.words if a.startswith("GPU")}, key=lambda name: int(name[3:]))

    @property
    def nics(self) -> list[str]:
        return sorted({b for _, b in self.words if not b.startswith("GPU")})

    @property
    def nvlink(self) -> bool:
        """Whether every pair of GPUs is joined by NVLink."""
        pairs = [w for (a, b), w in self.words.items() if a.startswith("GPU") and b.startswith("GPU")]
        return bool(pairs) and all(w.startswith("NV") for w in pairs)

    def between_gpus(self) -> dict[str, int]:
        """Word -> number of pairs of GPUs."""
        found: dict[str, int] = {}
        for (a, b), word in self.words.items():
            if a.startswith("GPU") and b.startswith("GPU") and int(a[3:]) < int(b[3:]):
                found[word] = found.get(word, 0) + 1
        return found

    def pair_size(self) -> int:
        """GPUs below one switch (or joined by NVLink), for the cluster fact `gpus_per_pair`; 1 where they are not alike
        or not consecutive."""
        gpus = self.gpus

        def near(gpu: str) -> list[int]:
            words = [(i, self.words.get((gpu, other), "")) for i, other in enumerate(gpus) if other != gpu]
            return sorted([gpus.index(gpu), *(i for i, w in words if w in NEAR or w.startswith("NV"))])

        groups = [near(gpu) for gpu in gpus]
        size = len(groups[0]) if groups else 1
        blocks = [list(range(i // size * size, i // size * size + size)) for i in range(len(gpus))]
        return size if groups == blocks else 1

    def far_neighbours(self) -> list[tuple[str, str]]:
        """Consecutive GPUs, as rings visit them, whose way leaves the NUMA node."""
        return [(a, b) for a, b in zip(self.gpus, self.gpus[1:], strict=False) if self.words.get((a, b)) == FAR]

    def nearest_nic(self, gpu: str) -> str | None:
        """The word of the network interface that is nearest to a GPU; None where there is none."""
        order = ("PIX", "PXB", "PHB", "NODE", "SYS")
        found = [w for nic in self.nics if (w := self.words.get((gpu, nic))) in order]
        return min(found, key=order.index) if found else None


def parse_matrix(text: str) -> Links:
    """Read `nvidia-smi topo -m`; empty where there is no table."""
    words: dict[tuple[str, str], str] = {}
    numa: dict[str, str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = line.split()
        if not columns:
            if cells and _DEVICE.fullmatch(cells[0]) and "Affinity" in line:
                columns = [c for c in cells if _DEVICE.fullmatch(c)]
            continue
        if not cells or not _DEVICE.fullmatch(cells[0]) or len(cells) <= len(columns):
            continue
        row, values = cells[0], cells[1 : 1 + len(columns)]
        words |= {(row, c): v for c, v in zip(columns, values, strict=True) if c != row}
        behind = cells[1 + len(columns) :]
        if row.startswith("GPU") and len(behind) > 1 and re.fullmatch(r"[\d,-]+", behind[1]):
            numa[row] = behind[1]
    return Links(words, numa)


P2P = {
    "OK": "works",
    "CNS": "chipset not supported",
    "GNS": "GPU not supported",
    "TNS": "topology not supported",
    "NS": "not supported",
    "DR": "disabled by regkey",
    "U": "unknown",
}
"""What the cells of `nvidia-smi topo -p2p r` mean: its own legend."""


def parse_p2p(text: str) -> dict[tuple[str, str], str]:
    """Read `nvidia-smi topo -p2p r` (or w, p): (GPU, GPU) -> a key of `P2P`; empty where there is no table."""
    found: dict[tuple[str, str], str] = {}
    columns: list[str] = []
    for line in text.splitlines():
        cells = line.split()
        if not columns:
            columns = cells if cells and all(re.fullmatch(r"GPU\d+", c) for c in cells) else []
        elif cells and cells[0] in columns and len(cells) == 1 + len(columns):
            found |= {(cells[0], c): v for c, v in zip(columns, cells[1:], strict=True) if c != cells[0]}
    return found
