"""Which activations wait for the backward pass? One layer's input, and with `attention_kept` its attention's results.

megatron-core's checkpoint function computes a whole layer again, attention included: at a million tokens that is the
largest part of a step. This one hands the layer what its attention made the first time (`attention/kept.py`), so that
only norms, linears, rotary embedding and MLP are computed again. What is kept belongs to the graph of its own
micro-batch: no order of forward and backward passes can mix it up, and a step that is interrupted leaves nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megalong.attention.kept import Kept
from megalong.model.host import Parked

Tensors = tuple[Tensor, ...]


class Again(Protocol):
    """What can be recomputed: a layer."""

    def park(self, tensors: Tensors) -> Parked | None:
        """Send to the host what is kept for backward; None: it stays on the device."""
        ...

    def compute(self, hidden_SBH: Tensor, kept: Kept | None, rest: tuple[Any, ...], again: bool = False) -> Tensor:
        """The layer's output [S, B, hidden].

        Args:
            kept: takes or gives the attention's results; None: attend every time.
            rest: what else the layer needs, none of it differentiable.
            again: the layer's output is known; what counts is its graph.
        """
        ...


def recomputed(layer: Again, keep_attention: bool, hidden_SBH: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """`layer.compute`, whose activations are dropped and computed again in backward.

    Args:
        keep_attention: all but the attention is computed again.
        hidden_SBH: the layer's input [S, B, hidden].
    """
    return _Recomputed.apply(layer, keep_attention, hidden_SBH, rest)


class _Recomputed(torch.autograd.Function):
    """As torch's reentrant checkpoint; there is no dropout, so no generator's state has to be put back."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, layer: Again, keep_attention: bool, hidden_SBH: Tensor, rest: tuple[Any, ...]
    ) -> Tensor:
        kept = Kept() if keep_attention else None
        out = layer.compute(hidden_SBH, kept, rest)
        ctx.layer, ctx.keep_attention, ctx.rest = layer, keep_attention, rest
        waiting = (hidden_SBH, *(kept.tensors if kept else ()))
        ctx.parked = layer.park(waiting)
        if ctx.parked is None:
            ctx.save_for_backward(*waiting)
        return out

    @staticmethod
    def backward(ctx: Any, grad_SBH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_SBH, *results = ctx.saved_tensors if ctx.parked is None else ctx.parked.take()
        hidden_SBH = hidden_SBH.detach().requires_grad_(ctx.needs_input_grad[2])
        kept = Kept(results) if ctx.keep_attention else None
        del results
        with torch.enable_grad():
            out = ctx.layer.compute(hidden_SBH, kept, ctx.rest, again=True)
        assert kept is None or not kept.tensors, "the recomputed layer attended less often than the first time"
        torch.autograd.backward(out, grad_SBH)
        return None, None, hidden_SBH.grad, None
