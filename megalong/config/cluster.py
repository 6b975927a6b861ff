"""What is known about the machines that a run is planned for, and how well is each number known?

Every number is a `Fact`: its value, whether it is a data-sheet value (`spec`), a judgement (`assumed`) or was
`measured`, and where it comes from. Bandwidths are GB/s (1e9 bytes) in one direction, memory is GiB.
"""

# ruff: noqa: RUF009 - the defaults below are `dataclasses.field`s, made by a helper
from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from megalong.runtime.errors import ConfigError

TAGS = ("spec", "assumed", "measured")


@dataclass
class Fact:
    """One number about the hardware."""

    value: float
    tag: str
    """spec, assumed or measured."""
    source: str
    """Data sheet, reasoning, or the measurement: enough for a reader to check it."""

    def __post_init__(self) -> None:
        if self.tag not in TAGS:
            raise ConfigError(f"cluster fact tagged {self.tag!r} ({self.source}): choose one of {', '.join(TAGS)}.")


def _unknown(value: float) -> Fact:
    return field(default_factory=lambda: Fact(value, "assumed", "default of megalong/config/cluster.py"))


@dataclass
class ClusterConfig:
    """The machines: how many, what one device can do, and what the wires carry. One file each in conf/cluster."""

    name: str = "unnamed"
    gpu: str = "unknown device"
    device: str = "cuda"
    """Kind of device: cuda or cpu."""
    nodes: Fact = _unknown(1)
    gpus_per_node: Fact = _unknown(1)
    """Devices (or CPU ranks) of one node."""
    gpus_per_pair: Fact = _unknown(1)
    """Devices under one PCIe switch or NVLink bridge; consecutive local ranks share it."""
    nodes_per_leaf: Fact = _unknown(1)
    """Nodes under one leaf switch; consecutive nodes share it."""

    memory_gib: Fact = _unknown(16)
    """Memory of one device that a process can use, GiB."""
    reserve_gib: Fact = _unknown(1)
    """Taken by context, communication library and fragmentation, GiB."""
    peak_bf16_tflops: Fact = _unknown(1)
    """Dense bf16 peak of one device, TFLOP/s."""
    peak_fp32_tflops: Fact = _unknown(1)
    """Dense fp32 (or TF32 where that is used) peak of one device, TFLOP/s."""
    memory_gbs: Fact = _unknown(10)
    """Peak memory bandwidth of one device."""
    gpu_watts: Fact = _unknown(100)

    gemm_efficiency: Fact = _unknown(0.7)
    """Share of the peak that matrix multiplications of training shapes reach."""
    attention_forward_efficiency: Fact = _unknown(0.5)
    """Share of the peak that the attention kernel reaches forward (FLOPs of the visible half)."""
    attention_backward_efficiency: Fact = _unknown(0.4)
    """The same backward, counting 5 matrix products."""
    memory_efficiency: Fact = _unknown(0.8)
    """Share of the memory bandwidth that element-wise operators reach."""
    step_overhead_s: Fact = _unknown(0.0)
    """Time of an optimizer step that is neither arithmetic nor bytes (launches, Python), seconds."""
    layer_overhead_s: Fact = _unknown(0.0)
    """The same per layer and micro-batch, forward and backward together, seconds."""

    pair_gbs: Fact = _unknown(10)
    """From one device to another of the same pair."""
    node_gbs: Fact = _unknown(10)
    """From one device to another of the same node, outside its pair."""
    nics_per_node: Fact = _unknown(1)
    nic_gbs: Fact = _unknown(10)
    """Rate of one network interface."""
    spine_share: Fact = _unknown(1)
    """What remains of a network interface's rate between leaf switches (1: non-blocking)."""
    node_latency_us: Fact = _unknown(10)
    """Start of a transfer inside a node, microseconds."""
    network_latency_us: Fact = _unknown(20)
    """Start of a transfer between nodes, microseconds."""
    exchange_share: Fact = _unknown(1)
    """Share of a wire's rate inside a node that each direction keeps while the same two ranks send to each other (gloo:
    half)."""
    network_exchange_share: Fact = _unknown(1)
    """The same between two nodes."""
    reduce_scatter_cost: Fact = _unknown(1)
    """Time of a reduce-scatter relative to an all-gather of the same tensor (gloo sums in an all-reduce: 2)."""
    host_device_gbs: Fact = _unknown(10)
    """Between host and device memory."""

    host_memory_gib: Fact = _unknown(16)
    """Memory of one node's host, GiB."""
    host_watts: Fact = _unknown(100)
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


def load_cluster(path: str | Path) -> ClusterConfig:
    """A cluster file outside conf/cluster, such as one that `tools/plan.py calibrate` wrote.

    Raises:
        ConfigError: the file is not one, or holds what a cluster file does not know.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found: object = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(path)))
    except (OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is no cluster file: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(found, ClusterConfig)
    return found
