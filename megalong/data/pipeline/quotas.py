"""The tokens of each part of a stage: shares of sources and lengths, exact to the token.

Shares become whole numbers by largest remainders (Hamilton), so that they sum to the budget and none is off by a token
or more. Per-source length upsampling follows Fu et al. (arXiv 2402.10171, section 3): the mix of sources stays what
it is, and inside each source long documents get a larger share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megalong.data.pipeline.settings import ANY, Settings
from megalong.runtime.errors import DataError


@dataclass(frozen=True)
class Group:
    """Documents of one source and a range of lengths, and how much of them is wanted."""

    source: str
    """Name, or `*`."""
    min_tokens: int = 0
    max_tokens: int | None = None
    whole_windows: bool = False
    tokens: int = 0
    """Of the stage, separators included."""
    window: int | None = None
    """Tokens of its sequences; None: the stage's window."""

    def __str__(self) -> str:
        window = "" if self.window is None else f", for sequences of {self.window:,}"
        if not self.min_tokens and self.max_tokens is None:
            return f"{self.source}{window}"
        end = "and more" if self.max_tokens is None else f"to {self.max_tokens - 1:,}"
        return f"{self.source}, {self.min_tokens:,} {end} tokens{window}"


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, each less than one away from its share; ties go to the first.

    Args:
        shares: not negative, in any unit, at least one above 0.
    """
    exact = [Fraction(share) for share in shares]
    whole = sum(exact)
    wanted = [total * share / whole for share in exact]
    found = [int(w) for w in wanted]
    order = sorted(range(len(wanted)), key=lambda i: (found[i] - wanted[i], i))
    for i in order[: total - sum(found)]:
        found[i] += 1
    return found


def groups_of(settings: Settings, sources: Sequence[str]) -> list[list[Group]]:
    """The parts of the mix without their tokens: for each source (or band of an explicit mix) its parts.

    Raises:
        DataError: a source that the settings name is not there.
    """
    named = {*settings.shares, *(b.source for b in settings.mix if b.source != ANY)}
    if unknown := sorted(named - set(sources)):
        raise DataError(f"There is no source {', '.join(unknown)}; the documents have: {', '.join(sources)}.")
    if settings.mix:
        return [[Group(b.source, b.min_tokens, b.max_tokens, b.whole_windows, 0, b.window)] for b in settings.mix]
    names = [name for name in sources if not settings.shares or settings.shares.get(name)]
    edge = settings.long_from
    if edge is None:
        return [[Group(name)] for name in names]
    return [[Group(name, 0, edge), Group(name, edge, None)] for name in names]


def with_tokens(
    settings: Settings,
    parts: list[list[Group]],
    available: dict[Group, int],
    totals: dict[int | None, int],
    seq_length: int,
) -> list[Group]:
    """Every part with its tokens.

    Args:
        available: tokens of each part that the documents have.
        totals: window (None: the stage's) -> tokens of all its parts.
        seq_length: the stage's window.
    """
    if settings.mix:
        of_mix: list[Group] = []
        for window, tokens in totals.items():
            groups = [p for (p,) in parts if p.window == window]
            shares = [b.share for b in settings.mix if b.window == window]
            of_mix += _with_whole_windows(groups, [s / sum(shares) for s in shares], tokens, window or seq_length)
        return of_mix
    (total,) = totals.values()
    have = [float(sum(available[p] for p in of_source)) for of_source in parts]
    shares = [settings.shares[p[0].source] for p in parts] if settings.shares else have
    if not any(shares):
        raise DataError("There is no document to train on.")
    found: list[Group] = []
    for of_source, tokens in zip(parts, apportion(total, shares), strict=True):
        inside = [1.0] if len(of_source) == 1 else [1 - (settings.long_share or 0), settings.long_share or 0]
        found += [_wanted(p, t) for p, t in zip(of_source, apportion(tokens, inside), strict=True)]
    return found


def require_enough(groups: list[Group], available: dict[Group, int], passes: int, estimated: bool = False) -> None:
    """Stop when a part has too little.

    Args:
        available: tokens of each part (without its `tokens`) in one pass.

    Raises:
        DataError: what is wanted, what is there and what is missing, by part.
    """
    lines = []
    for group in groups:
        have = available[_wanted(group, 0)] * passes
        if have < group.tokens:
            lines.append(f"  {group}: {group.tokens:,} wanted, {have:,} there, {group.tokens - have:,} missing")
    if lines:
        seen = " as a sample of the source has it" if estimated else ""
        again = f" in {passes} passes" if passes > 1 else ""
        raise DataError(
            f"Too little data for the stage (tokens{seen}{again}):\n" + "\n".join(lines) + "\n"
            "Give more text, take fewer sequences (train.steps, data.sequences), change the mix, or let documents be "
            "used more than once (data.max_passes)." + (" data.estimate=false tokenizes all the same." if seen else "")
        )


def _wanted(group: Group, tokens: int) -> Group:
    return replace(group, tokens=tokens)


def _with_whole_windows(groups: list[Group], shares: list[float], total: int, seq_length: int) -> list[Group]:
    """Parts of whole windows get whole sequences, the others what is left."""
    rest = 1 - sum(s for g, s in zip(groups, shares, strict=True) if g.whole_windows)
    others = [i for i, g in enumerate(groups) if not g.whole_windows and shares[i]]
    windows = [i for i, g in enumerate(groups) if g.whole_windows and shares[i]]
    found = [0] * len(groups)
    whole = [shares[i] for i in windows] + ([max(rest, 0.0)] if others else [])
    rows = apportion(total // seq_length, whole) if whole else []
    for i, count in zip(windows, rows, strict=False):
        found[i] = count * seq_length
    if others:
        left = total - sum(found)
        for i, tokens in zip(others, apportion(left, [shares[i] for i in others]), strict=True):
            found[i] = tokens
    return [_wanted(g, t) for g, t in zip(groups, found, strict=True)]
