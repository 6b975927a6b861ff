"""One picture of a plan: the rings on the machines, and where memory and time go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalong.planning.memory import GIB
from megalong.planning.plan import Plan
from megalong.runtime.errors import ConfigError
from megalong.topology.placement import groups

PATH = "#1a1a1a"
GAP = 0.35  # between nodes, in widths of a device


def draw(plan: Plan, title: str, path: Path) -> None:
    """Write a PNG: every device coloured by its ring, one ring drawn as a path, memory and time as stacked bars.

    Raises:
        ConfigError: it cannot be written there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(14, 10), layout="constrained")
    map_axes, memory_axes, time_axes = figure.subplot_mosaic(
        [["map"], ["memory"], ["time"]], height_ratios=[7, 1.4, 1.4]
    ).values()
    _rings(plan, map_axes)
    _stack(
        memory_axes,
        {name: size / GIB for name, size in plan.memory.terms.items()},
        "GiB",
        f"memory of one device: {plan.memory.total / GIB:.1f} of {plan.memory.capacity / GIB:.1f} GiB",
        plan.memory.capacity / GIB,
    )
    _stack(
        time_axes,
        {name.replace("_", " "): value for name, value in asdict(plan.step.seconds).items()},
        "s",
        f"one optimizer step: {plan.step_s:.1f} s, {plan.use.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, "
        f"MFU {plan.use.mfu:.0%}, {plan.gpu_hours:,.0f} GPU hours for the stage",
        None,
    )
    work = plan.work
    figure.suptitle(
        f"{title}: {work.seq_length:,} tokens, {work.layout} on {work.layout.world_size} {plan.cluster.gpu} "
        "(computed, not measured)",
        fontsize=14,
    )
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: a kind of file that is none of a picture
        raise ConfigError(f"picture={path} cannot be written: {error}.") from error
    finally:
        pyplot.close(figure)


def _rings(plan: Plan, axes: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    placement, layout = plan.placement, plan.work.layout
    per_node = placement.gpus_per_node
    nodes = max(placement.node(r) for r in range(layout.world_size)) + 1
    per_row = min(nodes, int(plan.cluster.nodes_per_leaf.value) if nodes > 8 else nodes)
    per_row = max(1, min(per_row, 16))
    width = 2 if per_node > 2 else 1
    height = -(-per_node // width)

    def corner(slot: int) -> tuple[float, float]:
        node, local = divmod(slot, per_node)
        row, column = divmod(node, per_row)
        x = column * (width + GAP) + local % width
        return x, -row * (height + 3 * GAP) - local // width

    rings = groups(layout, "cp") if layout.cp > 1 else [[r] for r in range(layout.world_size)]
    by_replica = layout.dp > 1
    colours = colormaps["tab10" if max(layout.dp, 1) <= 10 else "tab20"]
    for index, ring in enumerate(rings):
        at = layout.coordinates(ring[0])
        colour = colours((at.dp if by_replica else index) % colours.N)
        for rank in ring:
            x, y = corner(placement.slot(rank))
            axes.add_patch(Rectangle((x, y), 0.92, 0.92, color=colour, alpha=0.55 + 0.45 * (at.tp % 2 == 0)))
    for node in range(nodes):
        x, y = corner(node * per_node)
        axes.add_patch(
            Rectangle((x - 0.06, y - height + 0.94), width + 0.04, height + 0.04, fill=False, lw=0.6, color="#999999")
        )
        axes.text(x + width / 2, y + 1.02, f"node {node}", ha="center", va="bottom", fontsize=6, color="#666666")
    ring = rings[0]
    points = [(x + 0.46, y + 0.46) for x, y in (corner(placement.slot(r)) for r in ring)]
    if len(points) > 1:
        closed = [*points, points[0]]
        axes.plot(*zip(*closed, strict=True), color=PATH, lw=1.6, alpha=0.85)
        for (xa, ya), (xb, yb) in zip(points, closed[1:], strict=True):
            axes.annotate(
                "", xy=((xa + 2 * xb) / 3, (ya + 2 * yb) / 3), xytext=(xa, ya), arrowprops={"arrowstyle": "->", "lw": 1}
            )
    columns = min(nodes, per_row)
    rows = -(-nodes // per_row)
    axes.set_xlim(-0.5, columns * (width + GAP))
    axes.set_ylim(-rows * (height + 3 * GAP) + 0.9, 1.8)
    axes.set_aspect("equal")
    axes.axis("off")
    what = "replica (data-parallel rank)" if by_replica else "ring"
    shade = "; pale and full shades are the tensor-parallel ranks of a pair" if layout.tp > 1 else ""
    axes.set_title(
        f"{len(rings)} rings of {layout.cp}: a colour is a {what}{shade}; the black path is the ring of rank 0\n"
        + _ring_line(plan),
        fontsize=10,
    )


def _ring_line(plan: Plan) -> str:
    if not plan.ring:
        return "no ring hops"
    parts = [
        f"{row.edge} hop {row.needed_gbs:.1f} GB/s needed, {row.available_gbs:.0f} there"
        + (f", {row.exposed_ms:.1f} ms EXPOSED" if row.exposed_ms > 0 else ", hidden")
        for row in plan.ring
        if row.direction == "backward"
    ]
    return "backward: " + "; ".join(parts)


def _stack(axes: Any, terms: Mapping[str, float], unit: str, title: str, limit: float | None) -> None:
    from matplotlib import colormaps

    colours, left = colormaps["tab20"], 0.0
    total = sum(terms.values())
    span = max(total, limit or 0.0)
    shown = sorted(((n, v) for n, v in terms.items() if v > 0.002 * total), key=lambda t: -t[1])
    for index, (name, value) in enumerate(shown):
        axes.barh(0, value, left=left, color=colours(index), label=f"{name} {value:.3g} {unit}")
        if value > 0.09 * span:
            axes.text(left + value / 2, 0, f"{name}\n{value:.3g} {unit}", ha="center", va="center", fontsize=8)
        left += value
    if limit:
        axes.axvline(limit, color="red", lw=2)
        axes.text(limit, 0.42, " limit", color="red", va="bottom", ha="left", fontsize=8)
    axes.set_xlim(0, span * 1.04)
    axes.set_yticks([])
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=5, fontsize=8, frameon=False)
