"""How many bytes do the operators between the matrix products read and write? They are bound by memory.

Counted operator by operator over the eager program that `activations` describes, in bf16 (fp32 where the program is
in fp32): each operator reads its inputs and writes its output once.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.planning.parameters import padded_vocab_size, rank_parameters
from megalong.planning.workload import Workload

# Bytes per element of the operator's width; e = 2, fp32 intermediates 4.
NORM_FORWARD = 6 + 8 + 4 + 8 + 6 + 4  # to fp32, square, mean, scale, to bf16, times weight
NORM_BACKWARD = 6 + 4 + 6 + 8 + 16 + 4 + 8 + 12 + 12 + 6  # products, casts, two paths to the input, their sum
ADD = 6
ROTARY_FORWARD = 4 + 2 + 4 + 4 + 6 + 4  # times cos, negate half, join, times sin, add, join
ROTARY_BACKWARD = 4 + 4 + 2 + 4 + 6 + 4
COPY = 4
GATED_FORWARD = 4 + 4 + 6  # silu, up + 0, product
GATED_BACKWARD = 12 + 6 + 8 + 4  # two products, silu, join
MERGE_FORWARD = 14  # running fp32 output with one partial output, three quarters of the rows on average
MERGE_BACKWARD = 8  # fp32 dQ
MERGE_KEYS = 20  # fp32 dK and dV
LOSS_PASSES = 2 + 4 + 4 + 8 + 8 + 4 + 8 + 4 + 2 + 2  # logits: to fp32, max, shift, exp, sum, divide, gradient
WEIGHT_GRADIENT = 10  # bf16 gradient into fp32 main gradient
OPTIMIZER = 16 + 12 + 2 + 4  # read gradient, weight, two moments; write three and the bf16 weight; norm


@dataclass(frozen=True)
class ElementwiseBytes:
    """Bytes read and written by one rank."""

    layer_forward: float
    layer_backward: float
    loss: float
    """Of the logits, per micro-batch, forward, recompute and backward together (last stage)."""
    accumulate: float
    """Of all weight gradients of the stage, per micro-batch."""
    optimizer: float
    """Per step."""


def elementwise_bytes(work: Workload, pp_rank: int) -> ElementwiseBytes:
    """Bytes of one rank's element-wise operators per micro-batch."""
    model, layout, S = work.model, work.layout, work.local_tokens
    wide = 1.0 if work.precision == "bf16" else 1.5
    rows, hidden = S // layout.tp * model.hidden_size, S * model.hidden_size
    q = S * model.num_attention_heads * model.head_dim // layout.tp
    kv = S * model.num_key_value_heads * model.head_dim // layout.tp
    f = S * model.intermediate_size // layout.tp
    hops = layout.cp // work.inner - 1 if work.cp_comm_type != "all_gather" else 2 * (layout.cp > 1)
    forward = 2 * (NORM_FORWARD + ADD) * rows + COPY * q + ROTARY_FORWARD * (q + kv) + GATED_FORWARD * f
    backward = 2 * (NORM_BACKWARD + ADD) * rows + ROTARY_BACKWARD * (q + kv) + COPY * (q + 2 * kv) + GATED_BACKWARD * f
    forward += hops * MERGE_FORWARD * q
    backward += hops * (MERGE_BACKWARD * q + MERGE_KEYS * 2 * kv)
    last = pp_rank == layout.pp - 1
    vocab = padded_vocab_size(model.vocab_size, layout.tp) // layout.tp
    # slicing a piece of the hidden states makes its gradient as wide as the whole: one pass per piece
    slices = work.loss_chunks * 8 * hidden // layout.tp if work.loss_chunks > 1 else 0
    parameters = sum(p.numel for p in rank_parameters(model, layout.tp, layout.pp, pp_rank))
    return ElementwiseBytes(
        wide * forward,
        wide * backward,
        last * (LOSS_PASSES * S * vocab * (1.5 if work.loss_chunks > 1 else 1.0) + slices),
        WEIGHT_GRADIENT * parameters,
        OPTIMIZER * parameters / (layout.dp * layout.cp) + 8 * parameters,
    )
