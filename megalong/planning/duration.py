"""How long does an optimizer step take, term by term?

Arithmetic at the achieved share of the peak, bytes at the achieved share of the memory bandwidth, transfers at the
rate of the slowest wire of their group. Sums over one pipeline stage, the slowest, and the 1F1B schedule around it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megalong.config.cluster import ClusterConfig
from megalong.planning.communication import (
    LAYER_BACKWARD,
    LAYER_FORWARD,
    part,
    pipeline_message,
    step_bytes,
    tensor_parallel_whole,
)
from megalong.planning.elementwise import elementwise_bytes
from megalong.planning.flops import matmul_weights
from megalong.planning.parameters import buffer_of, padded_vocab_size, rank_parameters
from megalong.planning.ringtime import Moves, Pass, backward_pass, forward_pass, moves_of
from megalong.planning.workload import Workload
from megalong.topology.links import slowest
from megalong.topology.placement import Placement, groups


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
    again = 1 if work.recompute in ("selective", "full") else 0
    full = 1 if work.recompute == "full" else 0
    n = work.layers

    layer, head = _matmul_seconds(work, peak * cluster.gemm_efficiency.value)
    matmul = n * layer * (3 + full) + head * (3 + (work.loss_chunks > 1))
    attention = n * (forward.compute * (1 + again) + backward.compute)
    ring = n * (forward.exposed * (1 + again) + backward.exposed)
    tensor = _tensor_parallel_seconds(work, placement, layer, full)
    moved = elementwise_bytes(work, last)
    rate = cluster.memory_gbs.value * 1e9 * cluster.memory_efficiency.value
    element = (n * (moved.layer_forward * (1 + full) + moved.layer_backward) + moved.loss + moved.accumulate) / rate
    overhead = n * cluster.layer_overhead_s.value
    message = _pipeline_message_seconds(work, placement)

    micro = matmul + attention + ring + tensor + element + overhead + message
    m = work.micro_batches
    backward_share = (micro - message) * (2 + full) / (3 + full)
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
    tp, S, model = work.layout.tp, work.local_tokens, work.model
    layer = 2 * matmul_weights(model).layer * S / tp / rate
    head = 2 * model.hidden_size * padded_vocab_size(model.vocab_size, tp) * S / tp / rate
    return layer, head


def _tensor_parallel_seconds(work: Workload, placement: Placement, layer: float, full: int) -> float:
    """Exposed seconds per micro-batch: everything but what the weight gradients of column-parallel linears cover."""
    tp = work.layout.tp
    if tp == 1:
        return 0.0
    wire = slowest(placement, groups(work.layout, "tp"), reorder=work.reorders)
    one = wire.seconds(part(tensor_parallel_whole(work), tp), tp - 1)
    forward = (LAYER_FORWARD.all_gather + LAYER_FORWARD.reduce_scatter) * one * (1 + full)
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


def ring_bytes_per_step(work: Workload) -> int:
    """Bytes that a rank sends for attention in one step."""
    name = "+".join(a for a in ("cp",) if getattr(work.layout, a) > 1)
    sent = step_bytes(work, 0)
    return sum(size for (group, kind), size in sent.items() if group == name and kind in ("send", "all_gather"))


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
