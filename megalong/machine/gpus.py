"""Which GPUs does the driver see, and how wide is the slot of each? Reads the CSV of `nvidia-smi --query-gpu`, and
`nvidia-smi -q`."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass

FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "pci.bus_id",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "power.limit",
    "ecc.mode.current",
    "mig.mode.current",
)
"""What is asked for; how they are called: `nvidia-smi --help-query-gpu`."""
NOT_TOLD = ("", "N/A", "[N/A]", "[Not Supported]", "[Unknown Error]", "[GPU requires reset]")


@dataclass(frozen=True)
class Gpu:
    """One GPU; None where the driver does not tell."""

    name: str
    bus: str
    """Address without the domain, as lspci prints it: 01:00.0."""
    driver: str | None = None
    memory_gib: float | None = None
    link_generation_max: int | None = None
    link_width: int | None = None
    """Lanes now; the generation drops while a GPU idles, the width does not."""
    link_width_max: int | None = None
    power_limit_w: float | None = None
    mig: bool = False


def bus_address(bus_id: str) -> str:
    """`00000000:01:00.0` as `01:00.0`; a domain that is not 0 stays."""
    domain, _, rest = bus_id.strip().lower().partition(":")
    return rest if not domain.strip("0") else f"{domain[-4:]}:{rest}"


def parse_query(text: str) -> list[Gpu]:
    """Read the CSV of `nvidia-smi --query-gpu`, whatever fields were asked for, with or without units."""
    rows = list(csv.reader(text.strip().splitlines(), skipinitialspace=True))
    if len(rows) < 2 or "name" not in rows[0]:
        return []
    names = [column.split(" [")[0].strip() for column in rows[0]]
    found = []
    for row in rows[1:]:
        if len(row) != len(names):
            continue
        told = {n: v.strip() for n, v in zip(names, row, strict=True) if v.strip() not in NOT_TOLD}
        memory = _number(told.get("memory.total"))
        found.append(
            Gpu(
                name=told.get("name", "unknown"),
                bus=bus_address(told.get("pci.bus_id", "")),
                driver=told.get("driver_version"),
                memory_gib=None if memory is None else memory / 1024,
                link_generation_max=_whole(told.get("pcie.link.gen.max")),
                link_width=_whole(told.get("pcie.link.width.current")),
                link_width_max=_whole(told.get("pcie.link.width.max")),
                power_limit_w=_number(told.get("power.limit")),
                mig=told.get("mig.mode.current") == "Enabled",
            )
        )
    return found


def parse_q(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Read `nvidia-smi -q`: what is said of the driver, and of each GPU.

    Returns:
        (keys before the first GPU, one dictionary per GPU with its address under `bus`); keys inside a block are
        joined by ` / `, as in `MIG Mode / Current`.
    """
    common: dict[str, str] = {}
    gpus: list[dict[str, str]] = []
    blocks: list[tuple[int, str]] = []
    for line in text.splitlines():
        gpu = re.match(r"GPU ([0-9A-Fa-f]+:[0-9A-Fa-f:.]+)\s*$", line)
        if gpu:
            gpus.append({"bus": bus_address(gpu[1])})
            blocks = []
            continue
        if not line.strip() or line.startswith("="):
            continue
        depth = len(line) - len(line.lstrip())
        key, colon, value = (part.strip() for part in line.partition(" : "))
        blocks = [(d, name) for d, name in blocks if d < depth]
        if not colon:
            blocks.append((depth, key))
            continue
        (gpus[-1] if gpus else common)[" / ".join([*(name for _, name in blocks), key])] = value
    return common, gpus


def _number(value: str | None) -> float | None:
    match = re.match(r"-?\d+(\.\d+)?", value or "")
    return float(match[0]) if match else None


def _whole(value: str | None) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
