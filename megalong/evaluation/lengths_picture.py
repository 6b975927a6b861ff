"""A picture of how long documents were before they were chosen, and are in the stage's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalong.evaluation.plots import AFTER, BEFORE


def draw_lengths(lengths: Mapping[str, Mapping[str, Sequence[int]]], path: Path) -> Path:
    """Draw the share of tokens by length of their document, for each source, before and after.

    Args:
        lengths: `before` and `after`: source -> documents of 2^(i-1) to 2^i - 1 tokens.
        path: .png to write.

    Returns:
        path.
    """
    names = list(lengths["before"])
    figure = Figure(figsize=(7, 1.2 + 1.5 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)
    for (axis,), name in zip(axes, names, strict=True):
        for when, shift, colour in (("before", -0.2, BEFORE), ("after", 0.2, AFTER)):
            counts = lengths[when].get(name, ())
            tokens = [n * 0.75 * 2**i for i, n in enumerate(counts)]
            total = sum(tokens) or 1.0
            places = [i + shift for i in range(len(tokens))]
            axis.bar(places, [t / total for t in tokens], 0.4, color=colour, label=when)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_yticks([])
    longest = max((len(c) for when in lengths.values() for c in when.values()), default=1)
    ticks = range(0, longest + 1, 2)
    axes[-1][0].set_xticks(list(ticks), [f"{2**i:,}" for i in ticks], rotation=45, ha="right")
    axes[-1][0].set_xlabel("tokens of a document, up to")
    axes[0][0].set_title("share of tokens by length of document")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
