"""What the stages did as a picture: loss by position before and after each, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalong.evaluation.position import LossByPosition
from megalong.evaluation.results import WindowEvaluation

# Okabe-Ito: told apart with any colour vision
BEFORE, AFTER = "#D55E00", "#0072B2"


def plot_loss_by_position(stages: Mapping[str, WindowEvaluation], path: Path | IO[bytes], title: str) -> None:
    """One panel per stage, loss on held-out text against position in the window, before and after the stage.

    Bands are two standard errors over the held-out sequences, where these were kept apart.

    Args:
        stages: evaluations by panel title, in order; all panels share the loss axis.
        path: PNG to write, or an open file.
    """
    assert stages
    # Figure and its canvas directly: pyplot would keep global state and look for a display
    figure = Figure(figsize=(4.2 * len(stages) + 0.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    for panel, (name, stage) in zip(panels, stages.items(), strict=True):
        _draw(panel, stage.before, BEFORE, "before", "--")
        if stage.after is not None:
            _draw(panel, stage.after, AFTER, "after", "-")
        panel.axvspan(0.75 * stage.seq_length, stage.seq_length, color="0.93", zorder=0)
        panel.set_title(name)
        panel.set_xlim(0, stage.seq_length)
        panel.set_xlabel("position in the window (tokens)")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_locator(_quarters(stage.seq_length))
        panel.xaxis.set_major_formatter(lambda position, _: f"{position:,.0f}")
    panels[0].set_ylabel("loss on held-out text (nats per token)")
    panels[0].legend(title="shaded: last quarter; bands: 2 standard errors", frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")


def _draw(panel: Any, curve: LossByPosition, color: str, label: str, style: str) -> None:
    heights = [math.nan if loss is None else loss for loss in curve.loss]
    panel.stairs(heights, curve.edges, baseline=None, color=color, linestyle=style, linewidth=1.8, label=label)
    if any(curve.spread):
        reach = [0.0 if error is None else 2 * error for error in curve.spread]
        low, high = ([h + sign * r for h, r in zip(heights, reach, strict=True)] for sign in (-1, 1))
        panel.stairs(high, curve.edges, baseline=low, color=color, alpha=0.18, fill=True, linewidth=0)


def _quarters(seq_length: int) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator([seq_length * i / 4 for i in range(5)])
