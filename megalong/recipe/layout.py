"""A run's layout is the stage's own, what the user fixed, or the best one for the ranks that are there."""

from __future__ import annotations

import math

from megalong.config.schema import StageConfig
from megalong.planning.choose import best_layout
from megalong.planning.workload import workload_of
from megalong.run import Run
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import Layout
from megalong.topology.valid import as_overrides, layout_problems, nearest_layouts, valid_layouts

AXES = ("tp", "cp", "pp", "dp")


def stage_layout(stage: StageConfig) -> Layout:
    """The layout that a stage asks for."""
    return Layout(**{axis: getattr(stage.layout, axis) for axis in AXES})


def layout_for(run: Run, world_size: int | None) -> Layout:
    """The layout of a run for `world_size` ranks (None: as many as the layout wants).

    Args:
        run: with the layout that its stage asks for.

    Raises:
        LayoutError: the sizes do not multiply to the ranks that are there, or no valid layout exists.
    """
    topology, wanted = run.config.topology, run.layout
    fixed = {a: v for a in AXES if (v := getattr(topology, a)) is not None}
    if not fixed and topology.policy == "stage":
        if world_size is not None and world_size != wanted.world_size:
            raise LayoutError(_wrong_world(run, world_size))
        chosen = wanted
    elif len(fixed) == 4 or (world_size is None and topology.policy == "stage"):
        chosen = Layout(**{a: fixed.get(a, getattr(wanted, a)) for a in AXES})
    else:
        world = wanted.world_size if world_size is None else world_size
        product = math.prod(fixed.values())
        if world % product:
            raise LayoutError(_wrong_product(run, fixed, product, world))
        chosen = best_layout(workload_of(run), run.config.cluster, world, **fixed)
    if world_size is not None and chosen.world_size != world_size:
        raise LayoutError(
            f"The layout {chosen} takes {chosen.world_size} ranks, but {world_size} were started. Start "
            f"{chosen.world_size}, change the sizes, or leave one out to have it filled in."
        )
    return chosen


def _wrong_product(run: Run, fixed: dict[str, int], product: int, world: int) -> str:
    """What to say of sizes that do not divide the ranks, with what would run: other ranks, other sizes."""
    demand, wish = workload_of(run).demand, Layout(**{a: fixed.get(a, 1) for a in AXES})
    given = " ".join(f"topology.{a}={v}" for a, v in fixed.items())
    text = f"{given} take {product} ranks together, which does not divide the {world} started."
    if next(valid_layouts(demand, product, **fixed), None) is not None:
        text += f"\n  torchrun --nproc-per-node {product} ...: that layout"
    else:
        text += f" And {product} could not run it: {'; '.join(layout_problems(wish, demand))}."
    near = nearest_layouts(wish, list(valid_layouts(demand, world)), 1)
    return text + (f"\n  {as_overrides(near[0])}: the nearest layout of {world}" if near else "")


def _wrong_world(run: Run, world_size: int) -> str:
    from megalong.runtime.device import on_cuda

    what = ("GPU" if on_cuda() else "CPU process") + ("" if world_size == 1 else "s" if on_cuda() else "es")
    return (
        f"Stage {run.config.stage.name} wants {run.layout.world_size} GPUs ({run.layout}) for its window of "
        f"{run.seq_length:,} tokens; here: {world_size} {what}. Overrides that would run:\n"
        f"  +scale=mini                     the same code on this machine, window {run.seq_length // 256:,}\n"
        f"  topology=auto                   the full window on the ranks that are there (needs the memory)\n"
        f"  topology.tp=.. topology.cp=..   a layout of your own; what you leave out is filled in"
    )
