"""Steps alternate between the windows of a data folder as evenly as whole steps allow, by the step's number alone."""

from __future__ import annotations

from megalong.data.manifest import Manifest


def alternation(shares: list[int]) -> list[int]:
    """The part that each step of one round reads: `shares[i]` steps of part i.

    Every step goes to the part that is furthest behind its share, in whole numbers; equals to the first.
    """
    total, done, found = sum(shares), [0] * len(shares), []
    for step in range(1, total + 1):
        behind = [share * step - total * count for share, count in zip(shares, done, strict=True)]
        found.append(behind.index(max(behind)))
        done[found[-1]] += 1
    assert done == shares, (done, shares)
    return found


def steps_of(shares: list[int], steps: int) -> list[int]:
    """Of the first `steps` steps, how many read each part."""
    order = alternation(shares)
    rounds, rest = divmod(steps, len(order))
    return [rounds * share + order[:rest].count(i) for i, share in enumerate(shares)]


def steps_by_window(manifest: Manifest, steps: int) -> dict[int, int]:
    """Window -> how many of a run's first `steps` steps read it; the folder's own first."""
    found = steps_of([manifest.steps, *(other.steps for other in manifest.others)], steps)
    return dict(zip([manifest.seq_length, *(other.seq_length for other in manifest.others)], found, strict=True))
