"""Which layout is the best on these machines, which ones fit, and which are nearest to a wish that does not?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megalong.config.cluster import ClusterConfig
from megalong.planning.plan import Plan, make_plan
from megalong.planning.workload import Workload
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import Layout
from megalong.topology.placement import Placement, groups
from megalong.topology.valid import as_overrides, choose_layout, nearest_layouts, valid_layouts

SPARE = 0.05
"""Share of the memory that a chosen layout leaves free where it can: the plan may be wrong by as much."""


def keeps_to_nodes(placement: Placement) -> bool:
    """Tensor-parallel ranks talk most and cannot hide it: a layout that parts them over nodes is not considered."""
    return not any(placement.leaves_node(group) for group in groups(placement.layout, "tp"))


def candidates(work: Workload, cluster: ClusterConfig, world_size: int, **fixed: int | None) -> Iterator[Plan]:
    """A plan for every valid layout of `world_size` ranks and every policy that is open; `fixed` pins axes."""
    for layout in valid_layouts(work.demand, world_size, **fixed):
        if keeps_to_nodes(Placement(layout, cluster)):
            for one in work.on(layout).with_recompute():
                yield make_plan(one, cluster)


def best_recompute(work: Workload, cluster: ClusterConfig) -> str:
    """The policy of recompute for a layout: the fastest that leaves room to spare, else the one that needs least."""
    if len(work.with_recompute()) == 1:
        return work.recompute
    if work.layout.world_size > cluster.devices:
        return "full"  # nothing can be said of machines that are not described
    return ranking([make_plan(one, cluster) for one in work.with_recompute()])[0].work.recompute


def ranking(plans: Sequence[Plan]) -> list[Plan]:
    """Plans that fit, best first (see `cost`); then those that do not, smallest first."""
    fit = sorted((p for p in plans if p.fits), key=cost)
    rest = sorted((p for p in plans if not p.fits), key=lambda p: p.memory.total)
    return fit + rest


def cost(plan: Plan) -> tuple[bool, int, int]:
    """What is minimised: room to spare first, then step time to one percent, then memory."""
    tight = plan.memory.total > (1 - SPARE) * plan.memory.capacity
    return (tight, round(100 * math.log(plan.step_s)), plan.memory.total)


def best_layout(work: Workload, cluster: ClusterConfig, world_size: int, **fixed: int | None) -> Layout:
    """The fastest layout that fits; when nothing fits (or the cluster is too small to say) a sound valid one.

    Raises:
        LayoutError: no layout of `world_size` ranks is valid.
    """
    if world_size <= cluster.devices:
        fit = [plan for plan in candidates(work, cluster, world_size, **fixed) if plan.fits]
        if fit:
            return min(fit, key=cost).work.layout
    demand = work.demand
    return choose_layout(
        demand.model,
        demand.seq_length,
        demand.global_batch_size,
        world_size,
        cp_comm_type=demand.cp_comm_type,
        hierarchical_sizes=demand.hierarchical_sizes,
        **fixed,
    )


def check_fits(plan: Plan) -> None:
    """Refuse a run that cannot fit.

    Raises:
        LayoutError: with the terms that weigh most and the nearest layouts of the same ranks that fit.
    """
    if plan.fits:
        return
    memory = plan.memory
    gib = 2**30
    if memory.total > memory.capacity:
        heaviest = sorted(memory.terms.items(), key=lambda term: -term[1])[:3]
        what = (
            f"needs {memory.total / gib:.1f} GiB of the {memory.capacity / gib:.1f} GiB of one {plan.cluster.gpu} ("
            + ", ".join(f"{name} {size / gib:.1f}" for name, size in heaviest)
            + ")"
        )
    else:
        what = (
            f"needs {memory.host_per_node / gib:.0f} GiB of host memory per node, which has "
            f"{memory.host_capacity / gib:.0f}"
        )
    raise LayoutError(f"The layout {plan.work.layout} does not fit: it {what}.\n{advice(plan)}")


def advice(plan: Plan) -> str:
    """The nearest layouts of the same ranks that fit, as overrides."""
    world = plan.work.layout.world_size
    fit = {p.work.layout: p for p in candidates(plan.work, plan.cluster, world) if p.fits}
    near = nearest_layouts(plan.work.layout, list(fit))
    if near:
        return "Nearest layouts that fit: " + "; or ".join(as_overrides(x) for x in near) + "."
    hint = " train.recompute=full," if plan.work.recompute != "full" else ""
    return (
        f"No layout of {world} ranks fits:{hint} more ranks (topology.cp and topology.tp share out activations, "
        "topology.pp weights), a shorter window, or cluster=<one with more memory>."
    )
