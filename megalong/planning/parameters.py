"""Which parameters does one rank hold, and how does megatron-core lay out their buffers and optimizer shards?

The order is that of `GPTModel.named_parameters()` with the local layer spec, and the padding is that of
`megatron/core/distributed/param_and_grad_buffer.py` (0.16) under the distributed optimizer, so that bytes come out
exactly: parameters enter in reverse order, each starts at a multiple of 64 elements, and each bucket ends at a
multiple of the least common multiple of 128 and the number of ranks that share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megalong.config.schema import ModelConfig


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


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as tensor parallelism cuts it: the next multiple of tp (as `megalong.model.gpt` does)."""
    return math.ceil(vocab_size / tp) * tp


def rank_parameters(model: ModelConfig, tp: int, pp: int, pp_rank: int) -> list[Parameter]:
    """Parameters of a rank of pipeline stage `pp_rank`, in module order."""
    first, last = pp_rank == 0, pp_rank == pp - 1
    vocab = padded_vocab_size(model.vocab_size, tp) // tp
    tied = model.tie_word_embeddings
    found = []
    if first:
        found.append(Parameter("embedding.word_embeddings.weight", (vocab, model.hidden_size), shared=tied and pp > 1))
    for layer in range(model.num_hidden_layers // pp):
        found += [_named(f"decoder.layers.{layer}.", p) for p in layer_parameters(model, tp)]
    if last:
        found.append(Parameter("decoder.final_layernorm.weight", (model.hidden_size,), replicated=True))
        if not tied or pp > 1:
            found.append(Parameter("output_layer.weight", (vocab, model.hidden_size), shared=tied))
    return found


def layer_parameters(model: ModelConfig, tp: int) -> list[Parameter]:
    """Parameters of one transformer layer, in module order."""
    hidden, width = model.hidden_size, model.num_attention_heads * model.head_dim // tp
    qkv = width + 2 * model.num_key_value_heads * model.head_dim // tp
    mlp = model.intermediate_size // tp
    norm = (hidden,)
    found = [
        Parameter("input_layernorm.weight", norm, replicated=True),
        Parameter("self_attention.linear_proj.weight", (hidden, width)),
        Parameter("self_attention.linear_proj.bias", norm, replicated=True),
        Parameter("self_attention.linear_qkv.weight", (qkv, hidden)),
        Parameter("self_attention.linear_qkv.bias", (qkv,)),
        Parameter("pre_mlp_layernorm.weight", norm, replicated=True),
        Parameter("mlp.linear_fc1.weight", (2 * mlp, hidden)),
        Parameter("mlp.linear_fc1.bias", (2 * mlp,)),
        Parameter("mlp.linear_fc2.weight", (hidden, mlp)),
        Parameter("mlp.linear_fc2.bias", norm, replicated=True),
    ]

    def exists(p: Parameter) -> bool:
        if not p.name.endswith(".bias"):
            return True
        return model.attention_bias if p.name.startswith("self_attention") else model.mlp_bias

    return [p for p in found if exists(p)]


def _named(prefix: str, p: Parameter) -> Parameter:
    return Parameter(prefix + p.name, p.shape, p.replicated, p.shared)


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
        total = 0
        for start, stop in self.buckets:
            share = (stop - start) // self.group_size
            low = start + group_rank * share
            total += sum(max(0, min(b, low + share) - max(a, low)) for a, b in self.ranges)
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
