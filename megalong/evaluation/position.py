"""The loss along the window: sums by position bucket, computed where the tokens are.

Each rank adds its own tokens by their global positions; the vectors of all ranks that hold tokens are then summed (one
all-reduce of 2 * buckets numbers), and only the totals are divided. A model whose window was stretched without success
shows it in the last buckets first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

BUCKETS = 16


def bucket_edges(seq_length: int, buckets: int = BUCKETS) -> list[int]:
    """Positions [buckets + 1] that cut [0, seq_length) in parts equal to a token; fewer where the window is shorter."""
    buckets = min(buckets, seq_length)
    return [seq_length * i // buckets for i in range(buckets + 1)]


def bucket_sums(
    losses: torch.Tensor, loss_mask: torch.Tensor, positions: torch.Tensor, edges: list[int]
) -> torch.Tensor:
    """Sum of losses and number of valid tokens by bucket: [2, buckets] float64, to be added over ranks and batches.

    Args:
        losses: loss of each token in nats, any shape ending in [S]; masked ones may hold anything, NaN included.
        loss_mask: same shape; 0 leaves a token out, 1 counts it.
        positions: [S] global position of each token.
        edges: ascending positions [buckets + 1]; bucket i is [edges[i], edges[i + 1]).
    """
    inner = torch.tensor(edges[1:-1], dtype=positions.dtype, device=positions.device)
    bucket = torch.bucketize(positions, inner, right=True).expand(losses.shape).reshape(-1)
    valid = loss_mask.reshape(-1) > 0
    kept = torch.where(valid, losses.reshape(-1).double(), 0.0)
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64, device=losses.device)
    sums[0].index_add_(0, bucket, kept)
    sums[1].index_add_(0, bucket, valid.double())
    return sums


@dataclass(frozen=True)
class LossByPosition:
    """Mean loss in nats per position bucket."""

    edges: list[int]
    """[buckets + 1] positions; bucket i is [edges[i], edges[i + 1])."""
    loss: list[float | None]
    """[buckets]; None where no valid token lies."""
    last_quarter: float | None
    """Mean loss per valid token over the buckets of the last quarter of the window."""
    spread: list[float | None] = field(default_factory=list)
    """[buckets] standard error of `loss` over the sequences; None where fewer than two have a valid token. []: not
    known, as sums of all sequences together say nothing of it."""
    sequences: list[float | None] = field(default_factory=list)
    """Last quarter of each sequence, in the order of reading; []: not known. Two evaluations of the same sequences
    differ by less than either is uncertain: compare them in pairs (`paired`)."""

    @staticmethod
    def from_sums(sums: torch.Tensor, edges: list[int]) -> LossByPosition:
        """Divide the totals of `bucket_sums`, all ranks and batches added.

        Args:
            sums: [2, buckets], or [sequences, 2, buckets] where each sequence has its own.
        """
        sums = sums.cpu().double()
        total, count = sums.sum(0) if sums.dim() == 3 else sums
        # a bucket belongs to the last quarter when it begins there
        last = [i for i, edge in enumerate(edges[:-1]) if 4 * edge >= 3 * edges[-1]]
        mean = _ratio(float(total[last].sum()), float(count[last].sum()))
        loss = [_ratio(t, n) for t, n in zip(total.tolist(), count.tolist(), strict=True)]
        if sums.dim() != 3:
            return LossByPosition(list(edges), loss, mean)
        each = [[_ratio(t, n) for t, n in zip(*one, strict=True)] for one in sums.tolist()]
        spread = [standard_error([one[i] for one in each]) for i in range(len(loss))]
        quarters = [_ratio(float(t[last].sum()), float(n[last].sum())) for t, n in sums]
        return LossByPosition(list(edges), loss, mean, spread, quarters)


def standard_error(values: list[float | None]) -> float | None:
    """Of the mean of the values that are there; None of fewer than two."""
    known = [v for v in values if v is not None]
    if len(known) < 2:
        return None
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))


def paired(before: LossByPosition, after: LossByPosition) -> tuple[float, float] | None:
    """Change of the last quarter's loss from one evaluation to another of the same sequences, and its standard error.

    Returns:
        nats per token (negative: better) and their standard error; None where sequences were not kept apart.
    """
    both = zip(before.sequences, after.sequences, strict=False)
    changes: list[float | None] = [b - a for a, b in both if a is not None and b is not None]
    error = standard_error(changes)
    known = [c for c in changes if c is not None]
    return None if error is None else (math.fsum(known) / len(known), error)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
