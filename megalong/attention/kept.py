"""How does a layer that is computed again get its attention without attending again? From what it kept.

A recomputed layer runs twice: once without gradients, and once more in the backward pass, where its queries, keys and
values come out as they did the first time. What attention made of them is kept in between; the second run builds its
differentiable step from the new q, k, v and the old out and lse, and neither kernel nor ring runs forward again.

Kept are `out` [S, B, H, D] in the model's dtype and `lse` [B, H, S] in the accumulation dtype, as the algorithm saves
them for backward. Algorithms that trade heads keep those of their own heads: the exchange of q, k, v and out is done
again, since keeping both shardings would cost the memory of the output twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Results = tuple[torch.Tensor, torch.Tensor]
"""(out, lse)."""


class Kept:
    """Results of one layer's attention for one micro-batch, in the order of its pieces.

    Args:
        tensors: what an earlier `Kept` held, to be taken instead of attending; None: attend, and hold the results.
    """

    def __init__(self, tensors: Sequence[torch.Tensor] | None = None) -> None:
        self._takes = tensors is not None
        self.tensors = list(tensors or ())
        """out, lse, out, lse ... that are held."""

    def results(self, attend: Callable[[], Results]) -> Results:
        """(out, lse) of the next piece: of `attend()`, or those of the first time."""
        if self._takes:
            assert self.tensors, "the recomputed layer attends more often than the first time"
            out, lse, *self.tensors = self.tensors
            return out.detach(), lse
        out, lse = attend()
        self.tensors += (out, lse)
        return out, lse


def results(kept: Kept | None, attend: Callable[[], Results]) -> Results:
    """(out, lse) by way of `kept`, if there is one."""
    return attend() if kept is None else kept.results(attend)
