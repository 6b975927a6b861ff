"""Does it fit? All that one rank holds at its worst moment, by term, against the memory of the device and the host."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.cluster import ClusterConfig
from megalong.planning.static import static_bytes
from megalong.planning.steptape import step_memory
from megalong.planning.workload import Workload
from megalong.topology.layout import Coordinates

GIB = 2**30
HOST_PROCESS_BYTES = 4 * GIB  # Python, torch, CUDA libraries and pinned buffers of one rank: a judgement


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the rank that needs most."""

    rank_stage: int
    """Its pipeline stage."""
    terms: dict[str, int]
    """By term; they add up to `total`."""
    capacity: int
    """Memory of the device."""
    host_per_node: int
    host_capacity: int

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity and self.host_per_node <= self.host_capacity


def memory_plan(work: Workload, cluster: ClusterConfig) -> MemoryPlan:
    """Memory of the worst rank of a workload.

    The first context- and data-parallel rank of a stage holds a full optimizer shard; only pipeline stages differ.
    """
    stages = {0, work.layout.pp - 1}
    worst = max((_terms(work, stage, cluster) for stage in stages), key=lambda found: sum(found[1].values()))
    stage, terms = worst
    per_node = min(int(cluster.gpus_per_node.value), work.layout.world_size)
    # a synchronous save stages the rank's optimizer shard, and its weights, in host memory; CPU ranks live there
    staged = terms["weights"] + terms["optimizer shard"]
    host = staged + (HOST_PROCESS_BYTES if work.device == "cuda" else sum(terms.values()))
    return MemoryPlan(
        rank_stage=stage,
        terms=terms,
        capacity=int(cluster.memory_gib.value * GIB),
        host_per_node=per_node * host,
        host_capacity=int(cluster.host_memory_gib.value * GIB),
    )


def _terms(work: Workload, stage: int, cluster: ClusterConfig) -> tuple[int, dict[str, int]]:
    static = static_bytes(work, Coordinates(tp=0, cp=0, dp=0, pp=stage))
    step = step_memory(work, stage)
    terms = {
        "weights": static.weights,
        "gradients": static.gradients,
        "optimizer shard": static.optimizer,
        **step.at_peak,
        "rotary phases": 4 * work.local_tokens * work.model.head_dim,
        "gathered sequence": gather_buffer(work),
        "reserve": int(cluster.reserve_gib.value * GIB),
    }
    return stage, {name: size for name, size in terms.items() if size or name in ("weights", "optimizer shard")}


def gather_buffer(work: Workload) -> int:
    """megatron's buffer that holds the input of a column-parallel linear, gathered over tensor-parallel ranks."""
    return work.local_tokens * work.model.hidden_size * work.element_bytes if work.layout.tp > 1 else 0
