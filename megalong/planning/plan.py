"""What will this run cost, and can it run at all? One object with everything the planner knows of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megalong.config.cluster import ClusterConfig
from megalong.model.flops import hardware_flops_per_step, model_flops_per_step
from megalong.planning.duration import StepTime, checkpoint_seconds, step_time
from megalong.planning.memory import MemoryPlan, memory_plan
from megalong.planning.ring import RingRow, ring_map
from megalong.planning.workload import Workload, workload_of
from megalong.run import Run
from megalong.topology.placement import Placement

SIGNAL_EARLY_S = 60  # Slurm may send the signal this much before its time


@dataclass(frozen=True)
class Utilisation:
    """Throughput of a step, whether planned or measured."""

    tokens_per_second_per_gpu: float
    mfu: float
    """Model FLOPs per second as a share of the dense bf16 peak, whatever the run's precision."""
    hfu: float
    """Executed FLOPs per second as a share of the same peak."""


def utilisation(work: Workload, cluster: ClusterConfig, seconds: float, window: int | None = None) -> Utilisation:
    """What one optimizer step of `seconds` makes of the devices.

    Args:
        window: tokens of its sequences, of which several are packed where they are shorter; None: the run's window.
    """
    model, length, world = work.model, window or work.seq_length, work.layout.world_size
    batch = work.global_batch_size * (work.seq_length // length)
    how = {"chunked_loss": work.loss_chunks > 1, "tiled_mlp": work.mlp_tile > 0}
    executed = hardware_flops_per_step(model, length, batch, work.recompute, **how)

    def share(flops: float) -> float:
        return flops / seconds / world / (cluster.peak_tflops * 1e12)

    return Utilisation(
        work.tokens_per_step / seconds / world, share(model_flops_per_step(model, length, batch)), share(executed)
    )


@dataclass(frozen=True)
class ShorterSteps:
    """Steps that read shorter sequences, packed to the window."""

    window: int
    """Tokens of a sequence."""
    steps: int
    step: StepTime


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
    shorter: tuple[ShorterSteps, ...] = ()
    """Steps that read sequences shorter than the window."""

    @property
    def cluster(self) -> ClusterConfig:
        return self.placement.cluster

    @property
    def fits(self) -> bool:
        return self.memory.fits

    @property
    def step_s(self) -> float:
        """Seconds of one optimizer step of the window."""
        return self.step.seconds.total

    def step_s_of(self, window: int) -> float:
        """Seconds of one optimizer step that reads sequences of `window` tokens."""
        found = {other.window: other.step.seconds.total for other in self.shorter}
        return found.get(window, self.step_s)

    @property
    def wall_s(self) -> float:
        """Seconds of the stage: its steps and its checkpoints."""
        seconds = [other.step.seconds.total for other in self.shorter for _ in range(other.steps)]
        own = self.work.steps - len(seconds)
        return own * self.step_s + sum(seconds) + self.work.checkpoints * self.checkpoint_s

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
    def use(self) -> Utilisation:
        """Throughput and utilisation of a step that takes as long as planned."""
        return utilisation(self.work, self.cluster, self.step_s)

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
        tuple(ShorterSteps(w, steps, step_time(work.reading(w), placement)) for w, steps in work.shorter),
    )


def plan_of(run: Run) -> Plan:
    """The plan of a run."""
    return make_plan(workload_of(run), run.config.cluster)
