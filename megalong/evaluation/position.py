"""The loss along the window: sums by position bucket, computed where the tokens are.

Each rank adds its own tokens by their global positions; the vectors of all ranks that hold tokens are then summed (one
all-reduce of 2 * buckets numbers), and only the totals are divided. A model whose window was stretched without success
shows it in the last buckets first.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    @staticmethod
    def from_sums(sums: torch.Tensor, edges: list[int]) -> LossByPosition:
        """Divide the totals of `bucket_sums` ([2, buckets], all ranks and batches added)."""
        total, count = sums.cpu().double()
        loss = [float(t / n) if n else None for t, n in zip(total, count, strict=True)]
        # a bucket belongs to the last quarter when it begins there
        last = [i for i, edge in enumerate(edges[:-1]) if 4 * edge >= 3 * edges[-1]]
        tokens = float(count[last].sum())
        return LossByPosition(list(edges), loss, float(total[last].sum()) / tokens if tokens else None)
