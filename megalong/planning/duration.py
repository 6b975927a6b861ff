"""The seconds of an optimizer step, term by term: arithmetic, memory, wires, and the pipeline around them.

Arithmetic at the achieved share of the peak, bytes at the achieved share of the memory bandwidth, transfers at the
rate of the slowest wire of their group. Sums over one pipeline stage, the slowest, and the 1F1B schedule around it.

Operators between the matrix products are bound by memory: their bytes are counted operator by operator over the eager
program that `activations` describes, in bf16 (fp32 where the program is in fp32), each input read and each output
written once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megalong.config.cluster import ClusterConfig
from megalong.model.flops import extra_mlp_products, matmul_weights
from megalong.planning.parameters import buffer_of, rank_parameters
from megalong.planning.ring import Moves, Pass, backward_pass, exposed_again, forward_pass, moves_of
from megalong.planning.traffic import (
    LAYER_BACKWARD,
    LAYER_FORWARD,
    layer_forward_again,
    part,
    pipeline_message,
    tensor_parallel_whole,
)
from megalong.planning.workload import Workload
from megalong.topology.links import slowest
from megalong.topology.placement import Placement, groups

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
class StepSeconds:
    """Seconds of one optimizer step by term; they add up to the step."""

    matmul: float
    """Linear layers and the output layer, recompute included."""
    attention: float
    """Attention kernels, recompute included."""
    ring: float
    """Exposed travel of keys, values and their gradients."""
    tensor_parallel: float
    """Exposed gathers and reduce-scatters of hidden states."""
    elementwise: float
    """Norms, rotary embedding, gating, residuals, loss, gradient accumulation."""
    overhead: float
    """What is neither arithmetic nor bytes."""
    pipeline_messages: float
    pipeline_bubble: float
    """Waiting for the pipeline to fill and drain."""
    gradient_reduction: float
    """Exposed part of reducing gradients and gathering parameters."""
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StepTime:
    """A step and what it is made of."""

    seconds: StepSeconds
    forward: Pass
    """One forward pass of one attention layer."""
    backward: Pass
    moves: Moves


def step_time(work: Workload, placement: Placement) -> StepTime:
    """Time of one step on a placement."""
    cluster, layout = placement.cluster, work.layout
    peak = cluster.peak_flops(work.precision)
    moves = moves_of(work, placement)
    forward = forward_pass(work, moves, peak * cluster.attention_forward_efficiency.value)
    backward = backward_pass(work, moves, peak * cluster.attention_backward_efficiency.value)
    last = layout.pp - 1
    again, n = work.again, work.layers

    layer, head = _matmul_seconds(work, peak * cluster.gemm_efficiency.value)
    mlp = layer * work.model.hidden_size * work.model.intermediate_size / matmul_weights(work.model).layer
    tiles = mlp * extra_mlp_products(again) if work.mlp_tile else 0.0
    matmul = n * (layer * (3 + again.layers) + tiles) + head * (3 + (work.loss_chunks > 1))
    attention = n * (forward.compute * (1 + again.attention) + backward.compute)
    ring = n * (forward.exposed + exposed_again(work, moves, forward) + backward.exposed)
    tensor = _tensor_parallel_seconds(work, placement, layer)
    moved = elementwise_bytes(work, last)
    rate = cluster.memory_gbs.value * 1e9 * cluster.memory_efficiency.value
    element = (
        n * (moved.layer_forward * (1 + again.layers) + moved.layer_backward) + moved.loss + moved.accumulate
    ) / rate
    overhead = n * cluster.layer_overhead_s.value
    message = _pipeline_message_seconds(work, placement)

    micro = matmul + attention + ring + tensor + element + overhead + message
    m = work.micro_batches
    backward_share = (micro - message) * (2 + again.layers) / (3 + again.layers)
    reduction = _reduction_seconds(work, placement, backward_share)
    return StepTime(
        StepSeconds(
            matmul=m * matmul,
            attention=m * attention,
            ring=m * ring,
            tensor_parallel=m * tensor,
            elementwise=m * element,
            overhead=m * overhead + cluster.step_overhead_s.value,
            pipeline_messages=m * message,
            pipeline_bubble=(layout.pp - 1) * micro,
            gradient_reduction=reduction,
            optimizer=moved.optimizer / rate,
        ),
        forward,
        backward,
        moves,
    )


def _matmul_seconds(work: Workload, rate: float) -> tuple[float, float]:
    """Forward seconds of one layer's and of the output layer's matrix products, one micro-batch, one rank."""
    tp, S = work.layout.tp, work.local_tokens
    layer = 2 * matmul_weights(work.model).layer * S / tp / rate
    return layer, 2 * work.model.hidden_size * work.vocab * S / rate


def _tensor_parallel_seconds(work: Workload, placement: Placement, layer: float) -> float:
    """Exposed seconds per micro-batch: everything but what the weight gradients of column-parallel linears cover."""
    tp = work.layout.tp
    if tp == 1:
        return 0.0
    wire = slowest(placement, groups(work.layout, "tp"), reorder=work.reorders)
    one = wire.seconds(part(tensor_parallel_whole(work), tp), tp - 1)
    passes = (LAYER_FORWARD, layer_forward_again(work))
    forward = sum(counts.all_gather + counts.reduce_scatter for counts in passes) * one
    # backward of qkv and fc1: the gather runs beside the input gradient, the scatter beside the weight gradient,
    # each as long as that linear's forward; qkv and fc1 are three quarters of a layer's products, roughly even here
    beside = 2 * max(0.0, one - layer * 3 / 8)
    backward = 2 * beside + (LAYER_BACKWARD.all_gather - 2) * one
    outside = (1 + 1 + 2 + (work.loss_chunks > 1)) * one  # embedding and output layer
    return work.layers * (forward + backward) + outside


def _pipeline_message_seconds(work: Workload, placement: Placement) -> float:
    """Seconds per micro-batch in which a stage waits for hidden states and their gradients to cross."""
    if work.layout.pp == 1:
        return 0.0
    wire = slowest(placement, groups(work.layout, "pp"))
    return 2 * wire.seconds(pipeline_message(work))


def _reduction_seconds(work: Workload, placement: Placement, backward: float) -> float:
    """Exposed seconds of reduce-scatter and all-gather over dp x cp, per step."""
    layout = work.layout
    n = layout.dp * layout.cp
    if n == 1:
        return 0.0
    wire = slowest(placement, groups(layout, "cp", "dp"), reorder=work.reorders)
    numel = buffer_of(rank_parameters(work.model, layout.tp, layout.pp, 0), n).numel
    scatter = wire.seconds(part(4 * numel, n), n - 1) * placement.cluster.reduce_scatter_cost.value
    gather = wire.seconds(part(work.element_bytes * numel, n), n - 1)
    if work.overlap_gradients:
        scatter = max(scatter - backward, scatter * 0.05)  # the last bucket has nothing left to hide behind
    return scatter + gather


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
    q, kv, f = S * work.q_width, S * work.kv_width, S * work.mlp_width
    hops = layout.cp // work.inner - 1 if work.cp_comm_type != "all_gather" else 2 * (layout.cp > 1)
    forward = 2 * (NORM_FORWARD + ADD) * rows + COPY * q + ROTARY_FORWARD * (q + kv) + GATED_FORWARD * f
    backward = 2 * (NORM_BACKWARD + ADD) * rows + ROTARY_BACKWARD * (q + kv) + COPY * (q + 2 * kv) + GATED_BACKWARD * f
    forward += hops * MERGE_FORWARD * q
    backward += hops * (MERGE_BACKWARD * q + MERGE_KEYS * 2 * kv)
    last = pp_rank == layout.pp - 1
    # slicing a piece of the hidden states makes its gradient as wide as the whole: one pass per piece
    slices = work.loss_chunks * 8 * hidden // layout.tp if work.loss_chunks > 1 else 0
    parameters = sum(p.numel for p in rank_parameters(model, layout.tp, layout.pp, pp_rank))
    return ElementwiseBytes(
        wide * forward,
        wide * backward,
        last * (LOSS_PASSES * S * work.vocab * (1.5 if work.loss_chunks > 1 else 1.0) + slices),
        WEIGHT_GRADIENT * parameters,
        OPTIMIZER * parameters / (layout.dp * layout.cp) + 8 * parameters,
    )


def checkpoint_bytes(work: Workload) -> int:
    """Bytes of one checkpoint: weights, fp32 master weights and two moments, each once."""
    parameters = sum(
        p.numel * (1 if p.replicated else work.layout.tp)
        for stage in range(work.layout.pp)
        for p in rank_parameters(work.model, work.layout.tp, work.layout.pp, stage)
    )
    return parameters * (work.element_bytes + 12)


def checkpoint_seconds(work: Workload, cluster: ClusterConfig) -> float:
    """Time of writing one checkpoint."""
    return checkpoint_bytes(work) / (cluster.storage_gbs.value * 1e9)
