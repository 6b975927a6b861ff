"""Which layout does a run get? The stage's own, what the user fixed, or the best one for the ranks that are there."""

from __future__ import annotations

from megalong.config.schema import Config
from megalong.planning.choose import best_layout
from megalong.planning.workload import workload_of
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import Layout


def layout_of(config: Config) -> Layout:
    """The layout of a resolved configuration."""
    t = config.topology
    assert None not in (t.tp, t.cp, t.pp, t.dp), "resolve_layout has not run"
    return Layout(t.tp or 1, t.cp or 1, t.pp or 1, t.dp or 1)


def resolve_layout(config: Config, world_size: int | None) -> None:
    """Fill in `config.topology` for `world_size` ranks (None: as many as the layout wants).

    Raises:
        LayoutError: the sizes do not multiply to the ranks that are there, or no valid layout exists.
    """
    topology, stage = config.topology, config.stage
    fixed = {a: v for a in ("tp", "cp", "pp", "dp") if (v := getattr(topology, a)) is not None}
    wanted = Layout(stage.layout.tp, stage.layout.cp, stage.layout.pp, stage.layout.dp)
    if topology.policy not in ("stage", "auto"):
        raise LayoutError(f"topology.policy={topology.policy!r}: choose stage or auto.")
    if not fixed and topology.policy == "stage":
        if world_size is not None and world_size != wanted.world_size:
            raise LayoutError(_wrong_world(config, wanted, world_size))
        chosen = wanted
    elif len(fixed) == 4 or (world_size is None and topology.policy == "stage"):
        chosen = Layout(**{a: fixed.get(a, getattr(wanted, a)) for a in ("tp", "cp", "pp", "dp")})
    else:
        world = wanted.world_size if world_size is None else world_size
        product = 1
        for size in fixed.values():
            product *= size
        if world % product:
            given = " ".join(f"topology.{a}={v}" for a, v in fixed.items())
            raise LayoutError(f"{given} take {product} ranks together, which does not divide the {world} started.")
        topology.tp = topology.cp = topology.pp = topology.dp = None
        chosen = best_layout(workload_of(config), config.cluster, world, **fixed)
    if world_size is not None and chosen.world_size != world_size:
        raise LayoutError(
            f"The layout {chosen} takes {chosen.world_size} ranks, but {world_size} were started. Start "
            f"{chosen.world_size}, change the sizes, or leave one out to have it filled in."
        )
    topology.tp, topology.cp, topology.pp, topology.dp = chosen.tp, chosen.cp, chosen.pp, chosen.dp


def _wrong_world(config: Config, wanted: Layout, world_size: int) -> str:
    from megalong.runtime.device import on_cuda

    what = ("GPU" if on_cuda() else "CPU process") + ("" if world_size == 1 else "s" if on_cuda() else "es")
    return (
        f"Stage {config.stage.name} wants {wanted.world_size} GPUs ({wanted}) for its window of "
        f"{config.stage.seq_length:,} tokens; here: {world_size} {what}. Overrides that would run:\n"
        f"  +scale=mini                     the same code on this machine, window {config.stage.seq_length // 256:,}\n"
        f"  topology=auto                   the full window on the ranks that are there (needs the memory)\n"
        f"  topology.tp=.. topology.cp=..   a layout of your own; what you leave out is filled in"
    )
