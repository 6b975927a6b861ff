"""How many bytes does every collective of an optimizer step move? Exactly, by group and kind, for any rank.

Bytes are those that one rank sends when collectives run as rings, counted as in `megalong.training.beside`, which
counts the same in real runs. Who calls what:

- attention: `megalong.attention.traffic`, once forward (again under recompute) and once backward per layer;
- tensor parallelism with sequence parallelism (`megatron/core/tensor_parallel/layers.py`): a column-parallel linear
  gathers its input forward and again backward (for the weight gradient), and reduce-scatters the input gradient;
  a row-parallel linear reduce-scatters its output and gathers the output gradient;
- loss: three all-reduces of one fp32 number per token (`tensor_parallel/cross_entropy.py`);
- pipeline: hidden states forward, their gradients backward;
- step: reduce-scatter of fp32 main gradients and all-gather of parameters over dp x cp, gradients of replicated
  parameters over tp, of tied embeddings over the outer pipeline stages, and a few scalars.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from megalong.attention import traffic
from megalong.planning.parameters import buffer_of, default_bucket_size, rank_parameters
from megalong.planning.workload import Workload
from megalong.topology.layout import ORDER, Axis, Layout

Key = tuple[str, str]
"""(axes of the group joined by "+", kind of collective)."""


@dataclass(frozen=True)
class Counts:
    """How often collectives of one size run."""

    all_gather: int
    reduce_scatter: int


LAYER_FORWARD = Counts(all_gather=2, reduce_scatter=2)  # into qkv and fc1; out of proj and fc2
LAYER_BACKWARD = Counts(all_gather=4, reduce_scatter=2)  # inputs of qkv and fc1 again, gradients of proj and fc2


def layer_forward_again(work: Workload) -> Counts:
    """What the second forward pass of a layer runs; an MLP in tiles (`megalong.model.mlp`) moves nothing in it."""
    if not work.again.layers:
        return Counts(0, 0)
    return Counts(1, 1) if work.mlp_tile else LAYER_FORWARD


def group_name(layout: Layout, *axes: Axis) -> str:
    """How the group that spans `axes` is called: by those of them along which there is more than one rank."""
    return "+".join(a for a in ORDER if a in axes and getattr(layout, a) > 1)


def part(whole: int, n: int) -> int:
    """What one of n ranks sends of an all-gather or reduce-scatter whose whole tensor has `whole` bytes."""
    return whole * (n - 1) // n


def step_bytes(work: Workload, pp_rank: int) -> dict[Key, int]:
    """Bytes that a rank of pipeline stage `pp_rank` sends in one optimizer step, by (group, kind); zeros left out."""
    sent: dict[Key, int] = defaultdict(int)
    for part_of in (_attention, _tensor_parallel, _loss, _pipeline, _gradients, _scalars):
        for key, size in part_of(work, pp_rank).items():
            sent[key] += size
    return {key: size for key, size in sent.items() if size}


def _attention(work: Workload, pp_rank: int) -> dict[Key, int]:
    inner = work.inner if work.cp_comm_type == "a2a+p2p" else None
    forward = traffic.forward_bytes(work.cp_comm_type, work.shard, work.layout.cp, inner)
    backward = traffic.backward_bytes(work.cp_comm_type, work.shard, work.layout.cp, inner)
    times = work.layers * work.micro_batches
    # kept attention is not run again, but heads are traded again: a rank keeps the output of its own heads only
    again = tuple(forward) if work.again.attention else ("a2a",) if work.keeps_attention else ()
    sent: dict[Key, int] = defaultdict(int)
    for found, twice in ((forward, again), (backward, ())):
        for kind, size in found.items():
            passes = 1 + (kind in twice)
            # ring hops and head exchanges are batches of sends; gathers are collectives of that name
            name = kind if kind in ("all_gather", "reduce_scatter") else "send"
            sent[group_name(work.layout, "cp"), name] += size * passes * times
    return sent


def tensor_parallel_whole(work: Workload) -> int:
    """Bytes of the hidden states [S, hidden] that tensor-parallel ranks gather or reduce-scatter."""
    return work.local_tokens * work.model.hidden_size * work.element_bytes


def _tensor_parallel(work: Workload, pp_rank: int) -> dict[Key, int]:
    layout = work.layout
    if layout.tp == 1:
        return {}
    unit = part(tensor_parallel_whole(work), layout.tp)
    again = layer_forward_again(work)
    gathers = work.layers * (LAYER_FORWARD.all_gather + again.all_gather + LAYER_BACKWARD.all_gather)
    scatters = work.layers * (LAYER_FORWARD.reduce_scatter + again.reduce_scatter + LAYER_BACKWARD.reduce_scatter)
    if pp_rank == 0:  # embedding
        scatters += 1
        gathers += 1
    if pp_rank == layout.pp - 1:  # output layer, again in backward when the loss is computed in pieces
        gathers += 2 + (work.loss_chunks > 1)
        scatters += 1
    group = group_name(layout, "tp")
    replicated = sum(p.numel for p in rank_parameters(work.model, layout.tp, layout.pp, pp_rank) if p.replicated)
    return {
        (group, "all_gather"): unit * gathers * work.micro_batches,
        (group, "reduce_scatter"): unit * scatters * work.micro_batches,
        (group, "all_reduce"): 2 * part(4 * replicated, layout.tp),
    }


def _loss(work: Workload, pp_rank: int) -> dict[Key, int]:
    tp = work.layout.tp
    if tp == 1 or pp_rank < work.layout.pp - 1:
        return {}
    passes = 2 if work.loss_chunks > 1 else 1
    # each of the pieces rounds its own share down
    piece = work.local_tokens // work.loss_chunks
    size = 3 * 2 * part(4 * piece, tp) * work.loss_chunks * passes * work.micro_batches
    return {(group_name(work.layout, "tp"), "all_reduce"): size}


def pipeline_message(work: Workload) -> int:
    """Bytes of one hidden state handed to the next pipeline stage (cut over tensor-parallel ranks)."""
    return tensor_parallel_whole(work) // work.layout.tp


def _pipeline(work: Workload, pp_rank: int) -> dict[Key, int]:
    layout = work.layout
    if layout.pp == 1:
        return {}
    neighbours = (pp_rank > 0) + (pp_rank < layout.pp - 1)
    return {(group_name(layout, "pp"), "send"): neighbours * pipeline_message(work) * work.micro_batches}


def _gradients(work: Workload, pp_rank: int) -> dict[Key, int]:
    layout = work.layout
    n = layout.dp * layout.cp
    parameters = rank_parameters(work.model, layout.tp, layout.pp, pp_rank)
    sent: dict[Key, int] = {}
    if n > 1:
        buffer = buffer_of(parameters, n, default_bucket_size(n, pp_rank, work.overlap_gradients))
        group = group_name(layout, "cp", "dp")
        sent[group, "reduce_scatter"] = sum(part(4 * (b - a), n) for a, b in buffer.buckets)
        sent[group, "all_gather"] = sum(part(work.element_bytes * (b - a), n) for a, b in buffer.buckets)
    shared = sum(p.numel for p in parameters if p.shared)
    if shared:
        sent[group_name(layout, "pp"), "all_reduce"] = 2 * part(4 * shared, 2)
    return sent


def _scalars(work: Workload, pp_rank: int) -> dict[Key, int]:
    """Token count (int32), gradient norm (fp32) and the report of the loss (2 fp64)."""
    layout = work.layout
    sent: dict[Key, int] = defaultdict(int)
    if layout.pp > 1:
        sent[group_name(layout, "pp"), "broadcast"] += 4
    n = layout.dp * layout.cp
    if n > 1:
        sent[group_name(layout, "cp", "dp"), "all_reduce"] += 2 * part(4, n)
    if layout.world_size > 1:
        world = group_name(layout, *ORDER)
        sent[world, "all_reduce"] += 2 * part(4, layout.world_size) + 2 * part(16, layout.world_size)
    return sent
