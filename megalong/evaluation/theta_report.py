"""What a search for theta found: a table and a picture of loss against theta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalong.evaluation.theta_search import Found


def table(found: Found) -> str:
    """The finalists beside the pick."""
    lines = [
        f"theta {found.theta:,.0f} for {found.window:,} tokens, by {len(found.trials)} measurements and "
        f"{found.tokens:,} tokens; the lower bound is {found.bound:,.0f}",
        f"{'theta':>16}  {'needle':>6}  {'last quarter':>12}  {'harm, short':>11}  {'objective':>9}  above the pick",
    ]
    for s in found.standings:
        needle = "-" if s.needle is None else f"{s.needle:.0%}"
        lines.append(
            f"{s.theta:>16,.0f}  {needle:>6}  {s.last_quarter:>12.4f}  {s.harm:>+11.4f}  {s.objective:>9.4f}  "
            f"{s.difference:+.4f} +- {s.spread:.4f}"
        )
    lines.append(f"differences are paired over {found.schedule.seeds} seeds; +-: standard deviation over the seeds")
    return "\n".join(lines)


def draw(found: Found, path: Path) -> None:
    """A PNG of the loss on the last quarter against theta, a line for each number of steps."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    for steps in sorted({t.steps for t in found.trials}):
        own: dict[float, list[float]] = {}
        for trial in found.trials:
            if trial.steps == steps:
                own.setdefault(trial.theta, []).append(trial.scores.last_quarter)
        thetas = sorted(own)
        means = [sum(own[t]) / len(own[t]) for t in thetas]
        spread = [[m - min(own[t]) for m, t in zip(means, thetas, strict=True)]]
        spread.append([max(own[t]) - m for m, t in zip(means, thetas, strict=True)])
        label = f"{steps} steps" if steps else "without training"
        axes.errorbar(thetas, means, yerr=spread, marker="o", capsize=3, label=label)
    axes.axvline(found.bound, color="0.5", linestyle=":", label="lower bound")
    axes.axvline(found.theta, color="#009E73", linestyle="--", label=f"pick {found.theta:,.0f}")
    axes.set_xscale("log")
    axes.set_xlabel("theta")
    axes.set_ylabel("loss, last quarter of the window (nats per token)")
    axes.set_title(f"window {found.window:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
