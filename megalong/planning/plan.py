"""What will this run cost, and can it run at all? One object with everything the planner knows of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megalong.config.cluster import ClusterConfig
from megalong.config.schema import Config
from megalong.planning.communication import step_bytes
from megalong.planning.duration import StepTime, checkpoint_seconds, step_time
from megalong.planning.flops import hardware_flops_per_step, model_flops_per_step
from megalong.planning.memory import GIB, MemoryPlan, memory_plan
from megalong.planning.ringmap import RingRow, ring_map
from megalong.planning.workload import Workload, workload_of
from megalong.topology.placement import Placement

SIGNAL_EARLY_S = 60  # Slurm may send the signal this much before its time


@dataclass(frozen=True)
class Plan:
    """The predicted cost of one stage on one placement."""

    work: Workload
    placement: Placement
    memory: MemoryPlan
    step: StepTime
    ring: list[RingRow]
    checkpoint_s: float
    """Time of writing one checkpoint."""

    @property
    def cluster(self) -> ClusterConfig:
        return self.placement.cluster

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step."""
        return self.step.seconds.total

    @property
    def wall_s(self) -> float:
        """Seconds of the stage: its steps and its checkpoints."""
        return self.work.steps * self.step_s + self.work.checkpoints * self.checkpoint_s

    @property
    def gpu_hours(self) -> float:
        return self.wall_s / 3600 * self.work.layout.world_size

    @property
    def kwh(self) -> float:
        """Energy at full power of the devices and the nodes they sit in."""
        watts = self.work.layout.world_size * self.cluster.gpu_watts.value
        watts += self.placement.nodes * self.cluster.host_watts.value
        return watts * self.wall_s / 3.6e6

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.work.tokens_per_step / self.step_s / self.work.layout.world_size

    @property
    def mfu(self) -> float:
        """Model FLOPs per second as a share of the dense bf16 peak."""
        work = self.work
        return self._share(model_flops_per_step(work.model, work.seq_length, work.global_batch_size))

    @property
    def hfu(self) -> float:
        """Executed FLOPs per second as a share of the dense bf16 peak."""
        work = self.work
        chunked = work.loss_chunks > 1
        return self._share(
            hardware_flops_per_step(
                work.model, work.seq_length, work.global_batch_size, work.recompute, chunked_loss=chunked
            )
        )

    def _share(self, flops: float) -> float:
        return flops / self.step_s / self.work.layout.world_size / (self.cluster.peak_tflops * 1e12)

    @property
    def bottleneck(self) -> str:
        """The term that takes most of the step, and the slowest wire where a transfer shows."""
        terms = asdict(self.step.seconds)
        name = max(terms, key=lambda t: terms[t])
        text = f"{name.replace('_', ' ')} ({terms[name] / self.step_s:.0%} of the step)"
        worst = max(self.ring, key=lambda row: row.exposed_ms, default=None)
        if worst and worst.exposed_ms > 0:
            rate = f"{worst.available_gbs:.2g} GB/s"
            text += f"; the ring waits {worst.exposed_ms:.2f} ms for each {worst.edge} hop at {rate}"
        return text

    @property
    def collective_timeout_s(self) -> int:
        """After this long an unanswered collective is lost: three steps and two checkpoints, ten minutes at least."""
        return int(max(600.0, 3 * self.step_s + 2 * self.checkpoint_s))

    @property
    def signal_lead_s(self) -> int:
        """How long before the end of a job the signal must come, so that a step can end and a checkpoint be written."""
        return int(1.5 * self.step_s + 2 * self.checkpoint_s + SIGNAL_EARLY_S) + 1


def make_plan(work: Workload, cluster: ClusterConfig, slots: tuple[int, ...] | None = None) -> Plan:
    """Plan a workload.

    Args:
        slots: device slot of every rank, see `Placement`; None: block order.

    Raises:
        LayoutError: the cluster has too few devices.
    """
    placement = Placement(work.layout, cluster, slots)
    step = step_time(work, placement)
    return Plan(
        work,
        placement,
        memory_plan(work, cluster),
        step,
        ring_map(work, placement, step.forward, step.backward),
        checkpoint_seconds(work, cluster),
    )


def plan_of(config: Config) -> Plan:
    """The plan of a resolved configuration."""
    return make_plan(workload_of(config), config.cluster)


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan as plain values, for `output=json`. Units are in the keys."""
    work, layout = plan.work, plan.work.layout
    ranks = []
    for rank in range(layout.world_size):
        at = layout.coordinates(rank)
        ring = layout.stride("cp")
        base = rank - at.cp * ring
        neighbour = {d: base + (at.cp + d) % layout.cp * ring for d in (-1, 1)}
        ranks.append(
            {
                "rank": rank,
                "node": plan.placement.node(rank),
                "slot": plan.placement.slot(rank),
                **asdict(at),
                "ring_left": neighbour[-1],
                "ring_right": neighbour[1],
                "ring_edge": plan.placement.edge(rank, neighbour[1]) if layout.cp > 1 else "self",
            }
        )
    return {
        "window": work.seq_length,
        "layout": asdict(layout),
        "cp_comm_type": work.cp_comm_type,
        "hierarchical_context_parallel_sizes": work.hierarchical_sizes,
        "global_batch_size": work.global_batch_size,
        "steps": work.steps,
        "tokens": work.tokens_per_step * work.steps,
        "recompute": work.recompute,
        "precision": work.precision,
        "cluster": {
            "name": plan.cluster.name,
            "gpu": plan.cluster.gpu,
            "facts": {name: asdict(fact) for name, fact in plan.cluster.facts().items()},
        },
        "fits": plan.fits,
        "memory_bytes": plan.memory.terms,
        "memory_total_gib": plan.memory.total / GIB,
        "memory_capacity_gib": plan.memory.capacity / GIB,
        "host_memory_gib_per_node": plan.memory.host_per_node / GIB,
        "bytes_sent_per_step": {
            f"stage{s}": {"/".join(k): v for k, v in step_bytes(work, s).items()} for s in {0, layout.pp - 1}
        },
        "ring": [asdict(row) for row in plan.ring],
        "bottleneck": plan.bottleneck,
        "step_seconds": asdict(plan.step.seconds),
        "step_total_s": plan.step_s,
        "attention_layer": {"forward": asdict(plan.step.forward), "backward": asdict(plan.step.backward)},
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "checkpoint_s": plan.checkpoint_s,
        "wall_minutes": plan.wall_s / 60,
        "gpu_hours": plan.gpu_hours,
        "kwh": plan.kwh,
        "collective_timeout_s": plan.collective_timeout_s,
        "signal_lead_s": plan.signal_lead_s,
        "ranks": ranks,
    }
