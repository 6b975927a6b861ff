"""Does it fit? What one rank holds at the worst moment of a step, by term, against its device and its host.

A step is played on a tape: forward of one micro-batch, then its backward, at the moment when the rank holds the most
micro-batches of the 1F1B pipeline schedule. Equal layers in the middle are booked in one piece: only the first and the
last can be the highest.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.config.cluster import ClusterConfig
from megalong.planning.activations import SAVED, WORKING, LayerTape, Saved, Tape
from megalong.planning.parameters import static_bytes
from megalong.planning.traffic import tensor_parallel_whole
from megalong.planning.workload import Workload
from megalong.topology.layout import Coordinates

GIB = 2**30
HOST_PROCESS_BYTES = 4 * GIB  # Python, torch, CUDA libraries and pinned buffers of one rank: a judgement
LOSS, IN_FLIGHT = "logits and loss", "pipeline micro-batches in flight"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the rank that needs most."""

    rank_stage: int
    """Its pipeline stage."""
    terms: dict[str, int]
    """By term; they add up to `total`."""
    capacity: int
    """Memory of the device."""
    host_per_node: int
    host_capacity: int

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity and self.host_per_node <= self.host_capacity


def memory_plan(work: Workload, cluster: ClusterConfig) -> MemoryPlan:
    """Memory of the worst rank of a workload.

    The first context- and data-parallel rank of a stage holds a full optimizer shard; only pipeline stages differ.
    """
    stages = {0, work.layout.pp - 1}
    worst = max((_terms(work, stage, cluster) for stage in stages), key=lambda found: sum(found[1].values()))
    stage, terms = worst
    per_node = min(int(cluster.gpus_per_node.value), work.layout.world_size)
    # a synchronous save stages the rank's optimizer shard, and its weights, in host memory; CPU ranks live there
    staged = terms["weights"] + terms["optimizer shard"]
    host = staged + host_waiting(work, stage) + (HOST_PROCESS_BYTES if work.device == "cuda" else sum(terms.values()))
    return MemoryPlan(
        rank_stage=stage,
        terms=terms,
        capacity=int(cluster.memory_gib.value * GIB),
        host_per_node=per_node * host,
        host_capacity=int(cluster.host_memory_gib.value * GIB),
    )


def host_waiting(work: Workload, pp_rank: int) -> int:
    """Bytes of host memory in which a rank's recomputed layers wait, in buffers of powers of two."""
    if not work.waits_on_host:
        return 0
    layer = LayerTape(work, Tape())
    tensors = [layer.hidden_bytes]
    if work.keeps_attention:
        tensors += [layer.S * layer.q * layer.e, 4 * layer.S * work.shard.heads]
    in_flight = min(work.micro_batches, work.layout.pp - pp_rank)
    return in_flight * work.layers * sum(1 << (size - 1).bit_length() for size in tensors)


def _terms(work: Workload, stage: int, cluster: ClusterConfig) -> tuple[int, dict[str, int]]:
    static = static_bytes(work, Coordinates(tp=0, cp=0, dp=0, pp=stage))
    step = step_memory(work, stage)
    terms = {
        "weights": static.weights,
        "gradients": static.gradients,
        "optimizer shard": static.optimizer,
        **step.at_peak,
        "rotary phases": 4 * work.local_tokens * work.model.head_dim,
        # megatron's buffer that holds the input of a column-parallel linear, gathered over tensor-parallel ranks
        "gathered sequence": tensor_parallel_whole(work) if work.layout.tp > 1 else 0,
        "reserve": int(cluster.reserve_gib.value * GIB),
    }
    return stage, {name: size for name, size in terms.items() if size or name in ("weights", "optimizer shard")}


@dataclass(frozen=True)
class StepMemory:
    """Bytes above what a rank holds between steps."""

    saved: int
    """Kept between forward and backward of one micro-batch."""
    peak: int
    """Highest point of forward and backward."""
    at_peak: dict[str, int]
    """The peak by term."""


def step_memory(work: Workload, pp_rank: int) -> StepMemory:
    """Play one micro-batch of a rank on pipeline stage `pp_rank`."""
    tape = Tape()
    in_flight = min(work.micro_batches, work.layout.pp - pp_rank)
    if in_flight > 1:
        # where layers keep on the host, the schedule still holds what came in
        alone = LayerTape(work, tape).hidden_bytes if work.waits_on_host else _play(work, pp_rank, Tape())
        tape.take(IN_FLIGHT, (in_flight - 1) * alone)
    saved = _play(work, pp_rank, tape)
    return StepMemory(saved, tape.peak, tape.at_peak)


def _play(work: Workload, pp_rank: int, tape: Tape) -> int:
    """Forward and backward of one micro-batch; returns the bytes kept in between."""
    before = tape.live
    layer = LayerTape(work, tape)
    # on the host all wait but those of two neighbours: the layer that computes, and one that leaves or comes back
    layers = min(2, work.layers) if work.waits_on_host else work.layers
    first, last = pp_rank == 0, pp_rank == work.layout.pp - 1
    full = work.again.layers
    hidden = layer.take(layer.hidden_bytes)  # embedding, or what the stage before sent
    entered = hidden
    kept: list[Saved] = []
    inputs: list[int] = []
    middle = 0
    for index in range(layers):
        if index == 1 and layers > 3:
            # the layers between the first and the last keep what the first kept
            middle = tape.take(SAVED, (layers - 2) * _layer_saved(work))
        elif not 1 <= index < layers - 1 or layers <= 3:
            output, saved = layer.forward(keep=not full)
            kept.append(saved)
            inputs.append(hidden)
            if hidden != entered and (full or not layer.mixed):
                tape.move(SAVED, hidden)
            elif hidden != entered:
                tape.drop(hidden)
            hidden = output
    final = Saved()
    if last:
        layer.norm_forward(True, final)
        tape.move(SAVED, *final.handles())
        if layer.mixed:
            tape.drop(hidden)
        else:
            tape.move(SAVED, hidden)
        pieces = _loss_forward(work, layer, tape)
    else:
        tape.drop(hidden)  # sent on; the schedule keeps an empty shell
        pieces = []
    tape.move(SAVED, entered)
    if not full and layer.mixed and first:
        tape.drop(entered)
        entered = 0
    kept_bytes = tape.live - before

    if last:
        grad = _loss_backward(work, layer, tape, pieces)
        wide, narrow, normed = final.norms.pop()
        tape.drop(normed)
        grad = layer.norm_backward(grad, wide, narrow)
        if not layer.mixed:
            tape.drop(hidden)
    else:
        grad = layer.take(layer.hidden_bytes)  # received
    while kept:
        output, saved, source = 0, kept.pop(), inputs.pop()
        if full:
            output, saved = layer.forward(keep=True, context=saved.context)
        grad = layer.backward(grad, saved)
        tape.drop(output)  # its gradient was asked for by it
        if source != entered and (full or not layer.mixed):
            tape.drop(source)
        if middle:
            tape.drop(middle)
            middle = 0
    if first:
        _embedding_backward(work, layer, tape)
    tape.drop(grad, entered)
    assert tape.live == before, (tape.live, before)
    return kept_bytes


def _layer_saved(work: Workload) -> int:
    tape = Tape()
    layer = LayerTape(work, tape)
    layer.take(layer.hidden_bytes)
    output, _ = layer.forward(keep=not work.again.layers)
    tape.drop(output)
    return tape.live - (layer.hidden_bytes if layer.mixed and not work.again.layers else 0)


def _loss_forward(work: Workload, layer: LayerTape, tape: Tape) -> list[int]:
    tokens, vocab = work.local_tokens // work.loss_chunks, work.vocab
    # losses, and the labels of each piece, laid out for it and again for its backward
    losses = tape.take(LOSS, (4 + 16) * work.local_tokens)
    logits = tape.take(LOSS, tokens * vocab * layer.e)
    probabilities = tape.take(LOSS, 4 * tokens * vocab) if layer.mixed else 0
    if work.loss_chunks > 1:
        tape.drop(logits, probabilities)
        return [losses]
    if layer.mixed:
        tape.drop(logits)
        return [losses, probabilities]
    return [losses, logits]


def _loss_backward(work: Workload, layer: LayerTape, tape: Tape, pieces: list[int]) -> int:
    """Returns the gradient of the hidden states that enter the output layer."""
    tokens, vocab = work.local_tokens // work.loss_chunks, work.vocab
    weight = vocab * work.model.hidden_size
    several = work.loss_chunks > 1
    losses, *probabilities = pieces
    total = 0
    if several:
        total = layer.take(layer.hidden_bytes)
        logits = tape.take(LOSS, tokens * vocab * layer.e)
        if layer.mixed:
            probabilities = [tape.take(LOSS, 4 * tokens * vocab)]
            tape.drop(logits)
        else:
            probabilities = [logits]
    narrow = tape.take(LOSS, tokens * vocab * 2) if layer.mixed else 0
    if layer.mixed:
        tape.drop(*probabilities)
    whole = layer.take(tokens * work.model.hidden_size * layer.e)
    own = layer.take(tokens // layer.tp * work.model.hidden_size * layer.e) if layer.tp > 1 else 0
    new = tape.take(LOSS, weight * layer.e)
    tape.drop(narrow, whole if layer.tp > 1 else 0)
    if not layer.mixed:
        tape.drop(*probabilities)
    copy = tape.take(LOSS, 4 * weight) if layer.mixed and work.device == "cpu" else 0
    tape.drop(new, copy)  # added to the main gradient, piece by piece
    if several:
        wide = layer.take(layer.hidden_bytes)  # the piece's gradient, zero elsewhere
        tape.drop(own or whole, wide)
    tape.drop(losses)
    return total if several else own or whole


def _embedding_backward(work: Workload, layer: LayerTape, tape: Tape) -> None:
    """The dense gradient of the embedding, until it is in the main gradient."""
    weight = work.vocab * work.model.hidden_size
    whole = layer.take(work.local_tokens * work.model.hidden_size * layer.e) if layer.tp > 1 else 0
    gradient = tape.take(WORKING, weight * layer.e)
    copy = tape.take(WORKING, 4 * weight) if layer.mixed and work.device == "cpu" else 0
    tape.drop(gradient, copy, whole)
