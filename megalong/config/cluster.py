"""The machines that a run is planned for: every number a fact, with where it comes from.

Every number is a `Fact`: its value, whether it is a data-sheet value (`spec`), a judgement (`assumed`) or was
`measured`, and where it comes from. Bandwidths are GB/s (1e9 bytes) in one direction, memory is GiB.
"""

# ruff: noqa: RUF009 - the defaults below are `dataclasses.field`s, made by a helper
from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megalong.config.limits import check_limits, one_of, within
from megalong.runtime.errors import ConfigError

TAGS = ("spec", "assumed", "measured")
SHARES_OF_THE_PEAK = ("gemm_efficiency", "attention_forward_efficiency", "attention_backward_efficiency")


@dataclass
class Fact:
    """One number about the hardware."""

    value: float
    """Finite; its range stands at the field that holds the fact."""
    tag: str
    """spec, assumed or measured."""
    source: str
    """Data sheet, reasoning, or the measurement: enough for a reader to check it."""

    def __post_init__(self) -> None:
        if self.tag not in TAGS:
            raise ConfigError(f"cluster fact tagged {self.tag!r} ({self.source}): choose one of {', '.join(TAGS)}.")


def _unknown(value: float, **ends: Any) -> Fact:
    fact: Fact = field(
        default_factory=lambda: Fact(value, "assumed", "default of megalong/config/cluster.py"),
        metadata=within(**(ends or {"above": 0})),
    )
    return fact


SHARE = {"above": 0, "at_most": 1}
COUNT = {"at_least": 1, "whole": True}
TIME = {"at_least": 0}


@dataclass
class ClusterConfig:
    """The machines: how many, what one device can do, and what the wires carry. One file each in conf/cluster."""

    name: str = "unnamed"
    gpu: str = "unknown device"
    device: str = one_of(("cuda", "cpu"), "cuda")
    """Kind of device: cuda or cpu."""
    attention_kernel: str = one_of(("auto", "cuda_flash", "cudnn", "fa3"), "auto")
    """The kernel that was measured to be the faster one here; auto: nothing was, the device's generation decides."""
    nodes: Fact = _unknown(1, **COUNT)
    gpus_per_node: Fact = _unknown(1, **COUNT)
    """Devices (or CPU ranks) of one node."""
    gpus_per_pair: Fact = _unknown(1, **COUNT)
    """Devices under one PCIe switch or NVLink bridge; consecutive local ranks share it."""
    nodes_per_leaf: Fact = _unknown(1, **COUNT)
    """Nodes under one leaf switch; consecutive nodes share it."""

    memory_gib: Fact = _unknown(16)
    """Memory of one device that a process can use, GiB."""
    reserve_gib: Fact = _unknown(1, **TIME)
    """Taken by context, communication library and fragmentation, GiB."""
    peak_bf16_tflops: Fact = _unknown(1)
    """Dense bf16 peak of one device, TFLOP/s."""
    peak_fp32_tflops: Fact = _unknown(1)
    """Dense fp32 (or TF32 where that is used) peak of one device, TFLOP/s."""
    memory_gbs: Fact = _unknown(10)
    """Peak memory bandwidth of one device."""
    multiprocessors: Fact = _unknown(132, **COUNT)
    """Streaming multiprocessors of one device: a deterministic backward holds copies by their number."""
    gpu_watts: Fact = _unknown(100)

    gemm_efficiency: Fact = _unknown(0.7, **SHARE)
    """Share of the peak that matrix multiplications of training shapes reach."""
    attention_forward_efficiency: Fact = _unknown(0.5, **SHARE)
    """Share of the peak that the attention kernel reaches forward (FLOPs of the visible half)."""
    attention_backward_efficiency: Fact = _unknown(0.4, **SHARE)
    """The same backward, counting 5 matrix products."""
    memory_efficiency: Fact = _unknown(0.8, **SHARE)
    """Share of the memory bandwidth that element-wise operators reach."""
    step_overhead_s: Fact = _unknown(0.0, **TIME)
    """Time of an optimizer step that is neither arithmetic nor bytes (launches, Python), seconds."""
    layer_overhead_s: Fact = _unknown(0.0, **TIME)
    """The same per layer and micro-batch, forward and backward together, seconds."""

    pair_gbs: Fact = _unknown(10)
    """From one device to another of the same pair."""
    node_gbs: Fact = _unknown(10)
    """From one device to another of the same node, outside its pair."""
    nics_per_node: Fact = _unknown(1)
    nic_gbs: Fact = _unknown(10)
    """Rate of one network interface."""
    spine_share: Fact = _unknown(1, **SHARE)
    """What remains of a network interface's rate between leaf switches (1: non-blocking)."""
    node_latency_us: Fact = _unknown(10, **TIME)
    """Start of a transfer inside a node, microseconds."""
    network_latency_us: Fact = _unknown(20, **TIME)
    """Start of a transfer between nodes, microseconds."""
    exchange_share: Fact = _unknown(1, **SHARE)
    """Share of a wire's rate inside a node that each direction keeps while the same two ranks send to each other (gloo:
    half)."""
    network_exchange_share: Fact = _unknown(1, **SHARE)
    """The same between two nodes."""
    reduce_scatter_cost: Fact = _unknown(1)
    """Time of a reduce-scatter relative to an all-gather of the same tensor (gloo sums in an all-reduce: 2)."""
    host_device_gbs: Fact = _unknown(10)
    """Between host and device memory."""

    host_memory_gib: Fact = _unknown(16)
    """Memory of one node's host, GiB."""
    host_watts: Fact = _unknown(100, **TIME)
    """Power of one node besides its devices."""
    storage_gbs: Fact = _unknown(1)
    """Rate at which the whole cluster writes a checkpoint."""

    @property
    def peak_tflops(self) -> float:
        """Dense bf16 peak of one device, TFLOP/s: what MFU and HFU are shares of."""
        return self.peak_bf16_tflops.value

    def peak_flops(self, precision: str) -> float:
        """Dense peak of one device in FLOP/s for `bf16` or `fp32`."""
        fact = self.peak_bf16_tflops if precision == "bf16" else self.peak_fp32_tflops
        return fact.value * 1e12

    @property
    def devices(self) -> int:
        """Devices of the whole cluster."""
        return int(self.nodes.value * self.gpus_per_node.value)

    def facts(self) -> dict[str, Fact]:
        """All facts by name."""
        return {f.name: fact for f in fields(self) if isinstance(fact := getattr(self, f.name), Fact)}


def card(name: str) -> str:
    """What tells one card from another in a device's name: model and form, not vendor, memory or the usual SXM form.

    `NVIDIA H100 80GB HBM3` and `NVIDIA H100 SXM 80GB` are one card, `NVIDIA H100 PCIe` is another.
    """
    words = re.split(r"[\s\-_/()]+", name.upper())
    usual = re.compile(r"NVIDIA|AMD|INSTINCT|TESLA|GEFORCE|GPU|SXM\d*|OAM|HBM\d\w*|\d+GB|GB|TENSOR|CORE|")
    return " ".join(w for w in words if not usual.fullmatch(w))


def limit(base: ClusterConfig, gpu: str, name: str, best: Fact) -> Fact:
    """What efficiencies and MFU are shares of: the specification where one is known, else the best that was measured.

    Args:
        base: the cluster whose specification may hold.
        gpu: name of the device that was measured.
        name: the limit: a peak, or the bandwidth of memory.
        best: what was measured of it.

    Returns:
        `base`'s fact when it is a specification of this device and nothing was faster; else `best`, whose source says
        that it is no specification.
    """
    fact = base.facts()[name]
    if fact.tag != "spec" or card(base.gpu) != card(gpu):
        return Fact(best.value, best.tag, f"{best.source}; no specification known: this stands for it")
    if best.value > fact.value:
        return Fact(best.value, best.tag, f"{best.source}; above the specification of {fact.value:g} ({fact.source})")
    return Fact(fact.value, fact.tag, f"{fact.source}; best measured {best.value:g}")


def with_whole_shares(cluster: ClusterConfig, precision: str) -> ClusterConfig:
    """A share of a limit is at most 1: where a part ran faster than its limit, the limit is raised to it.

    Args:
        precision: bf16 or fp32: whose peak the shares are of.
    """
    facts = cluster.facts()
    shares = {
        "memory_gbs": ("memory_efficiency",),
        f"peak_{precision}_tflops": SHARES_OF_THE_PEAK,
    }
    changed: dict[str, Any] = {}
    for name, parts in shares.items():
        above = max(facts[part].value for part in parts)
        if above > 1:
            source = f"{facts[name].source}; raised to the fastest part measured"
            changed[name] = Fact(facts[name].value * above, "measured", source)
            changed |= {part: replace(facts[part], value=min(1.0, facts[part].value / above)) for part in parts}
    return replace(cluster, **changed)


def load_cluster(path: str | Path) -> ClusterConfig:
    """A cluster file outside conf/cluster, such as one that `tools/plan.py calibrate` wrote.

    Raises:
        ConfigError: the file is not one, or holds what a cluster file does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        found: object = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no cluster file: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(found, ClusterConfig)
    check_limits(found, "cluster.", str(path))
    return found


def to_yaml(cluster: ClusterConfig) -> str:
    """A file for conf/cluster."""
    lines = [f"# Measured on {time.strftime('%Y-%m-%d')}."]
    # a JSON string is one of YAML, whatever is in it
    lines += [f"{name}: {json.dumps(getattr(cluster, name))}" for name in ("name", "gpu", "device", "attention_kernel")]
    for name, fact in cluster.facts().items():
        lines.append(f"{name}: {{value: {fact.value:g}, tag: {fact.tag}, source: {json.dumps(fact.source)}}}")
    return "\n".join(lines) + "\n"
