"""What several checkpoints find in their windows as a person sees it: a table, a heat map of depth and length."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalong.evaluation.scores import Evaluation
from megalong.evaluation.suite import CellResult


def table(evaluations: Sequence[Evaluation], base: Evaluation | None = None) -> str:
    """Rows of what was asked, one column per checkpoint; a dash where something was not asked."""
    rows: list[tuple[str, list[str]]] = [
        ("window, tokens", [f"{e.window:,}" for e in evaluations]),
        ("theta", [f"{e.theta:,.0f}" for e in evaluations]),
    ]
    for task in dict.fromkeys(c.task for e in evaluations for c in e.cells):
        for length in dict.fromkeys(c.length for c in evaluations[0].cells if c.task == task):
            own = [[c for c in e.cells if c.task == task and c.length == length] for e in evaluations]
            rows.append((f"{task} at {length:,}", [_accuracy(cells) for cells in own]))
    rows += [
        ("loss, last quarter", [_number(e.position.last_quarter if e.position else None) for e in evaluations]),
        ("perplexity", [_number(e.perplexity) for e in evaluations]),
        ("loss of key tokens", [_number(e.long.loss if e.long else None) for e in evaluations]),
        ("loss, short documents", [_number(e.short_loss) for e in evaluations]),
    ]
    if base is not None and base.short_loss is not None:
        harm = [None if e.short_loss is None else e.short_loss - base.short_loss for e in evaluations]
        rows.append((f"above the base ({base.name})", [_number(h, "+.4f") for h in harm]))
    rows = [row for row in rows if any(text != "-" for text in row[1])]
    names = [e.name for e in evaluations]
    width = max(len(label) for label, _ in rows)
    widths = [max(len(n), *(len(values[i]) for _, values in rows)) for i, n in enumerate(names)]
    lines = [" " * width + "  " + "  ".join(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))]
    for label, values in rows:
        lines.append(f"{label:<{width}}  " + "  ".join(f"{v:>{w}}" for v, w in zip(values, widths, strict=True)))
    return "\n".join(lines)


def draw(evaluations: Sequence[Evaluation], task: str = "needle", titles: Sequence[str] | None = None) -> bytes:
    """A PNG: one panel per checkpoint, depth against length, the colour the share of answers found.

    Args:
        titles: of the panels; None: name, window and theta of each.
    """
    titles = titles or [f"{e.name}\nwindow {e.window:,}, theta {e.theta:,.0f}" for e in evaluations]
    own = [[c for c in e.cells if c.task == task and c.depth is not None] for e in evaluations]
    assert any(own), task
    figure = Figure(figsize=(4.4 * len(evaluations) + 0.8, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(evaluations), squeeze=False)[0]
    image: Any = None
    for panel, title, cells in zip(panels, titles, own, strict=True):
        lengths, depths = sorted({c.length for c in cells}), sorted({c.depth for c in cells if c.depth is not None})
        grid = [[_of(cells, length, depth) for length in lengths] for depth in depths]
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                panel.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("length (tokens)")
    panels[0].set_ylabel("depth")
    figure.colorbar(image, ax=list(panels), label="share of answers found")
    figure.suptitle(f"{task}: greedy by teacher forcing")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _of(cells: Sequence[CellResult], length: int, depth: float) -> float:
    return next(c.accuracy for c in cells if c.length == length and c.depth == depth)


def _accuracy(cells: Sequence[CellResult]) -> str:
    return f"{sum(c.accuracy for c in cells) / len(cells):.0%}" if cells else "-"


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else f"{value:{form}}"
