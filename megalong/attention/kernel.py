"""What must a kernel be able to do? Attention over one tile, forward and backward: the protocol of all of them.

A kernel knows "full" and "causal" (square), returns the output with its log-sum-exp, and differentiates a tile
given the *final* output and log-sum-exp of its queries. With those, P = exp(s - lse) is the tile's share of the
whole softmax, so the gradients of a tile are exact partial sums of the whole gradients, in any order.

GQA is native: keys and values have K heads, queries H, K divides H, and nothing is repeated.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

CuSeqlens = tuple[int, ...] | None
"""Rows 0 = c0 < c1 < ... < cm = S between which lie m causal squares, one after another on the diagonal."""


class Attended(NamedTuple):
    """What backward needs of queries and keys that have been attended."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    """Final: over all keys of the queries, not only these; so is lse."""
    lse: torch.Tensor


Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Kernel(Protocol):
    """Attention over one tile. Tensors are views in any memory order whose last dimension is contiguous."""

    name: str
    varlen: bool
    """Whether a causal call may have `cu_seqlens`: many documents in one call. Else they come one by one."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of q [B, H, Sq, D] and k, v [B, K, Sk, D].

        out is [B, H, Sq, D] in the inputs' dtype, lse [B, H, Sq] in the accumulation dtype.
        """
        ...

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        """(dq, dk, dv) of this tile, shaped as q, k, v."""
        ...
