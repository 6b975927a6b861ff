"""The parameters that one rank holds, and the bytes of them, of gradients and of optimizer state.

The order is that of `GPTModel.named_parameters()` with the local layer spec, and the padding is that of
`megatron/core/distributed/param_and_grad_buffer.py` (0.16) under the distributed optimizer, so that bytes come out
exactly: parameters enter in reverse order, each starts at a multiple of 64 elements, and each bucket ends at a
multiple of the least common multiple of 128 and the number of ranks that share it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megalong.config.schema import ModelConfig
from megalong.model.shape import Weight, embedding, final_norm, layer_weights, output_layer, padded_vocab_size
from megalong.planning.workload import Workload
from megalong.topology.layout import Coordinates


@dataclass(frozen=True)
class Parameter:
    """One parameter of one rank."""

    name: str
    shape: tuple[int, ...]
    replicated: bool = False
    """Held whole by every tensor-parallel rank; under sequence parallelism its gradient is summed over them."""
    shared: bool = False
    """A tied embedding that the first and the last pipeline stage both hold; it has a bucket of its own."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def rank_parameters(model: ModelConfig, tp: int, pp: int, pp_rank: int) -> list[Parameter]:
    """Parameters of a rank of pipeline stage `pp_rank`, in module order."""
    first, last = pp_rank == 0, pp_rank == pp - 1
    tied = model.tie_word_embeddings
    padded = replace(model, vocab_size=padded_vocab_size(model.vocab_size, tp))
    found = []
    if first:
        found.append(_cut(embedding(padded), tp, shared=tied and pp > 1))
    for layer in range(model.num_hidden_layers // pp):
        found += layer_parameters(model, tp, f"decoder.layers.{layer}.")
    if last:
        found.append(_cut(final_norm(model), tp))
        if not tied or pp > 1:
            found.append(_cut(output_layer(padded), tp, shared=tied))
    return found


def layer_parameters(model: ModelConfig, tp: int, prefix: str = "") -> list[Parameter]:
    """Parameters of one transformer layer, in module order: attention's output projection is made first."""
    weights = layer_weights(model)
    norm, *attention = (w for w in weights if w.name.startswith(("input_", "self_attention")))
    attention.sort(key=lambda w: "linear_qkv" in w.name)
    mlp = [w for w in weights if w.name.startswith(("pre_mlp", "mlp"))]
    return [_cut(w, tp, prefix) for w in (norm, *attention, *mlp)]


def _cut(weight: Weight, tp: int, prefix: str = "", shared: bool = False) -> Parameter:
    shape = tuple(n // tp if axis == weight.tp_axis else n for axis, n in enumerate(weight.shape))
    return Parameter(prefix + weight.name, shape, replicated=weight.tp_axis is None, shared=shared)


@dataclass(frozen=True)
class Buffer:
    """The contiguous buffer of a rank's parameters (and the equally long one of its main gradients), in elements."""

    ranges: tuple[tuple[int, int], ...]
    """[start, stop) of each parameter."""
    buckets: tuple[tuple[int, int], ...]
    """[start, stop) of each bucket, padding included; each is reduced and sharded by itself."""
    group_size: int
    """Ranks that share out the optimizer state: dp * cp."""

    @property
    def numel(self) -> int:
        """Elements of the buffer, padding included."""
        return self.buckets[-1][1]

    def shard_elements(self, group_rank: int) -> int:
        """Parameters (without padding) whose optimizer state the rank at `group_rank` of the group keeps."""
        total, starts = 0, [start for start, _ in self.ranges]
        for start, stop in self.buckets:
            share = (stop - start) // self.group_size
            low = start + group_rank * share
            overlapping = self.ranges[max(0, bisect_right(starts, low) - 1) : bisect_left(starts, low + share)]
            total += sum(max(0, min(b, low + share) - max(a, low)) for a, b in overlapping)
        return total


def buffer_of(parameters: Sequence[Parameter], group_size: int, bucket_size: int | None = None) -> Buffer:
    """How megatron lays out a rank's parameters.

    Args:
        group_size: ranks over which gradients are reduced and optimizer state is sharded, dp * cp.
        bucket_size: elements after which a bucket is closed; None: one bucket (no overlapped reduction).
    """
    divisor = math.lcm(group_size, 128)
    ranges: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    start = bucket_start = 0
    pending = False

    def close(at: int) -> int:
        nonlocal bucket_start, pending
        end = math.ceil(at / divisor) * divisor
        buckets.append((bucket_start, end))
        bucket_start, pending = end, False
        return end

    for p in reversed(parameters):
        start = math.ceil(start / 64) * 64
        if p.shared and pending:
            start = close(start)
        stop = start + p.numel
        ranges.append((start, stop))
        pending = True
        full = bucket_size is not None and stop - bucket_start >= bucket_size
        start = close(stop) if full or p.shared else stop
    if pending:
        close(start)
    return Buffer(tuple(ranges), tuple(buckets), group_size)


def default_bucket_size(group_size: int, pp_rank: int, overlap: bool) -> int | None:
    """megatron's bucket size in elements (`DistributedDataParallel.__init__`): bucketed only where the reduction
    overlaps with backward, and not on later pipeline stages."""
    return max(40_000_000, 1_000_000 * group_size) if overlap and pp_rank == 0 else None


MAIN_GRADIENT_BYTES = 4  # gradients are accumulated and reduced in fp32


@dataclass(frozen=True)
class StaticBytes:
    """What a rank keeps all the time, bytes."""

    weights: int
    """Parameters in the model's dtype, with the padding of megatron's buffer."""
    gradients: int
    """fp32 main gradients, padded alike."""
    optimizer: int
    """This rank's shard of fp32 master weights (bf16 runs only) and the two moments."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def static_bytes(work: Workload, at: Coordinates) -> StaticBytes:
    """Exactly what megatron's buffers and distributed optimizer hold on the rank at `at`."""
    layout = work.layout
    group = layout.dp * layout.cp
    parameters = rank_parameters(work.model, layout.tp, layout.pp, at.pp)
    buffer = buffer_of(parameters, group, default_bucket_size(group, at.pp, work.overlap_gradients))
    # fp32 runs update the parameters themselves: a shard of them is a view and costs nothing
    per_element = 12 if work.precision == "bf16" else 8
    return StaticBytes(
        weights=buffer.numel * work.element_bytes,
        gradients=buffer.numel * MAIN_GRADIENT_BYTES,
        optimizer=buffer.shard_elements(at.dp * layout.cp + at.cp) * per_element,
    )
