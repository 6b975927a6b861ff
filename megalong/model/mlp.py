"""How does the MLP get by without its wide intermediate for all tokens? In tiles along the sequence, in both passes.

The gate and the up projection make 2 * intermediate_size values of each token, seven times the hidden state of a
Llama-3-8B. A tile of `train.mlp_chunk` tokens makes them, uses them and forgets them; backward makes them once more
(tiled MLP: Arctic long-sequence training, arXiv 2506.13996). Kept for backward is the input of the norm alone.

Under tensor parallelism the normed sequence is gathered once per pass and the output reduce-scattered once, whatever
the number of tiles. Every tile adds its share of a weight's gradient to the fp32 main gradient (`head.py` says why).

One tile gives the gradients of megatron-core's modules bit for bit in bf16. (In fp32 autograd adds three shares of the
residual's gradient in the order of their arrival, this function the norm's two first: 3e-7.) Several tiles sum a
weight's gradient over their tokens in another order, and a matrix product may round a row otherwise where there are
fewer: fp32 gradients agree to 2e-6, bf16 ones are as far from fp32 as those of one tile, since sums are formed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim, _reduce_scatter_along_first_dim
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn.functional import silu

from megalong.model.elementwise import FusedSwiGLU, silu_times, silu_times_backward
from megalong.model.head import add_to_main_grad
from megalong.model.norm import RMSNorm


class FusedMLP(MLP):
    """megatron-core's MLP with one kernel between its linears, where functions are compiled (`runtime/fused.py`)."""

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
        """As megatron's: [S / tp, B, hidden] to the same shape, and the second bias."""
        assert not any(value is not None for value in rest.values()), rest
        assert self.config.gated_linear_unit, "a Llama's MLP is gated"
        assert self.config.activation_func is silu, self.config.activation_func
        wide, bias = self.linear_fc1(hidden_states)
        return self.linear_fc2(FusedSwiGLU.apply(wide if bias is None else wide + bias))


def tiled_mlp(norm: RMSNorm, mlp: MLP, x_SBH: Tensor, chunk: int, needed: bool) -> Tensor:
    """`mlp(norm(x))` without the second bias: [S / tp, B, hidden] to the same shape.

    Args:
        chunk: tokens of the gathered sequence whose intermediate exists at one time.
        needed: False where only the gradients of this pass count: the output is then zero, and costs nothing.
    """
    fc1, fc2 = mlp.linear_fc1, mlp.linear_fc2
    return _TiledMLP.apply(x_SBH, norm.weight, fc1.weight, fc1.bias, fc2.weight, _Parts(norm, mlp, chunk), needed)


class _Parts:
    """What both passes need besides tensors."""

    def __init__(self, norm: RMSNorm, mlp: MLP, chunk: int) -> None:
        config = mlp.config
        assert config.gated_linear_unit, "a Llama's MLP is gated"
        assert config.activation_func is silu, config.activation_func
        self.norm, self.chunk = norm, chunk
        self.group: Any = mlp.linear_fc1.tp_group
        assert config.tensor_model_parallel_size == 1 or config.sequence_parallel, "sequences are cut over tp ranks"

    def tiles(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.chunk):
            yield slice(start, min(start + self.chunk, length))

    def normed(self, x_SBH: Tensor) -> Tensor:
        """The norm's output for all tensor-parallel ranks, [S, B, hidden]; gathered into megatron's own buffer."""
        here = torch.empty_like(x_SBH)
        for tile in self.tiles(len(x_SBH)):
            here[tile] = self.norm(x_SBH[tile])
        return _gather_along_first_dim(here, self.group, use_global_buffer=True)


class _TiledMLP(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, norm_weight: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, parts: _Parts, needed: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights, ctx.parts = (norm_weight, w1, b1, w2), parts
        if not needed:
            return torch.zeros_like(x)
        normed = parts.normed(x)
        out = torch.empty_like(normed)
        for tile in parts.tiles(len(normed)):
            out[tile] = torch.matmul(silu_times(_wide(normed[tile], w1, b1)), w2.t())
        return _reduce_scatter_along_first_dim(out, parts.group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,), (norm_weight, w1, b1, w2), parts = ctx.saved_tensors, ctx.weights, ctx.parts
        grad = _gather_along_first_dim(grad, parts.group)
        normed = parts.normed(x)
        through = torch.empty_like(normed)
        bias = None if b1 is None else torch.zeros_like(b1, dtype=torch.float32)
        for tile in parts.tiles(len(normed)):
            wide = _wide(normed[tile], w1, b1)
            add_to_main_grad(w2, _rows(grad[tile]).t().matmul(_rows(silu_times(wide))))
            g_wide = silu_times_backward(grad[tile].matmul(w2), wide)
            del wide
            add_to_main_grad(w1, _rows(g_wide).t().matmul(_rows(normed[tile])))
            if bias is not None:
                bias += _rows(g_wide).sum(0)
            through[tile] = g_wide.matmul(w1)
        del normed
        through = _reduce_scatter_along_first_dim(through, parts.group)
        g_norm = torch.zeros_like(norm_weight, dtype=torch.float32)
        for tile in parts.tiles(len(x)):
            with torch.enable_grad():
                here = x[tile].detach().requires_grad_()
                found = torch.autograd.grad(parts.norm(here), (here, norm_weight), through[tile])
            through[tile] = found[0]
            g_norm += found[1]
        return (
            through,
            g_norm.to(norm_weight.dtype),
            None,
            None if bias is None else bias.to(b1.dtype),
            None,
            None,
            None,
        )


def _wide(normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Gate and up projection beside each other, [..., 2 * intermediate / tp]."""
    wide = torch.matmul(normed, weight.t())
    return wide if bias is None else wide.add_(bias)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)
