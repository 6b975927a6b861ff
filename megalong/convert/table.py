"""Which rows of which Hugging Face tensor make up a megatron-core tensor? Those of its row spans, one list per weight.

Every megatron-core tensor of a Llama is its Hugging Face tensors with rows (axis 0) put in another order; columns never
move. So the whole mapping is a list of *row spans*: `rows` rows from `hf_row` on in one tensor are the rows from
`megatron_row` on in the other. Weights, biases, gradients and optimizer moments follow the same spans, whole
tensors and slices alike, and the table needs no model, no GPU and no file.

- `linear_qkv`: per query group `[its query heads, key head, value head]` (megatron/core/transformer/attention.py).
- `linear_fc1`: gate over up; over tensor-parallel ranks each half is cut by itself (megatron/core/transformer/mlp.py).
- On disk, norms carry the Transformer Engine spec's names in either layer spec, and a layer index is a leading axis.
- No rotary permutation: Hugging Face weights and megatron-core both rotate halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megalong.config.schema import ModelConfig
from megalong.model.shape import EMBEDDING, OUTPUT, Weight, embedding, final_norm, layer_weights, output_layer
from megalong.runtime.errors import CheckpointError

LAYERS = "decoder.layers."
TIED_OUTPUT = "lm_head.weight"

# Names of parameters in the local layer spec -> names on disk (those of the Transformer Engine spec).
LOCAL_SPEC_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class RowSpan(NamedTuple):
    """`rows` consecutive rows that stay together."""

    hf_row: int
    megatron_row: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """The part of a megatron tensor that comes from one Hugging Face tensor."""

    hf_name: str
    rows: int
    """Rows of the Hugging Face tensor; all of them lie in `spans`."""
    spans: tuple[RowSpan, ...]


@dataclass(frozen=True)
class Entry:
    """One megatron tensor (of one layer) and where its rows come from."""

    name: str
    """Name inside the model or, with `layer` set, inside the layer; as on disk."""
    layer: int | None
    shape: tuple[int, ...]
    """Without the layer axis and without vocabulary padding."""
    pieces: tuple[Piece, ...]
    tp_axis: int | None = None
    """Axis that tensor parallelism cuts; None: every rank has all of it."""
    gated: bool = False
    """Two stacked halves that tensor parallelism cuts each by itself."""

    @property
    def key(self) -> str:
        """Name of the stacked tensor on disk."""
        return self.name if self.layer is None else LAYERS + self.name

    @property
    def parameter(self) -> str:
        """Name in the state dict of a whole (not pipelined) model, Transformer Engine spec."""
        return self.name if self.layer is None else f"{LAYERS}{self.layer}.{self.name}"

    @property
    def is_vocabulary(self) -> bool:
        """Whether megatron may pad the rows so that tensor parallelism divides them."""
        return self.name in (EMBEDDING, OUTPUT)

    def hf_shape(self, piece: Piece) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor of a piece."""
        return (piece.rows, *self.shape[1:])


def table(model: ModelConfig) -> list[Entry]:
    """All megatron tensors of a model, in the order of the forward pass."""
    entries = [_entry(embedding(model))]
    for layer in range(model.num_hidden_layers):
        entries += layer_table(model, layer)
    entries.append(_entry(final_norm(model)))
    if not model.tie_word_embeddings:
        entries.append(_entry(output_layer(model)))
    return entries


def layer_table(model: ModelConfig, layer: int) -> list[Entry]:
    """The megatron tensors of one layer (counted from 0)."""
    return [_entry(weight, layer) for weight in layer_weights(model)]


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint."""
    return {piece.hf_name: entry.hf_shape(piece) for entry in table(model) for piece in entry.pieces}


def _entry(weight: Weight, layer: int | None = None) -> Entry:
    prefix = "" if layer is None else f"model.layers.{layer}."
    width = weight.shape[0] // weight.groups  # rows of one group of all parts
    pieces, start = [], 0
    for name, rows in weight.parts:
        count = rows // weight.groups
        spans = tuple(RowSpan(g * count, g * width + start, count) for g in range(weight.groups))
        pieces.append(Piece(prefix + name, rows, spans))
        start += count
    name = LOCAL_SPEC_NAMES.get(weight.name, weight.name)
    return Entry(name, layer, weight.shape, tuple(pieces), weight.tp_axis, weight.gated)


# Whole tensors and tensor-parallel shards -----------------------------------------------------------------------


def to_hf(entry: Entry, megatron: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors inside a whole megatron tensor (weights and gradients alike).

    Args:
        megatron: [rows (+ vocabulary padding), ...], without a layer axis.
    """
    return {
        piece.hf_name: torch.cat([megatron[span.megatron_row : span.megatron_row + span.rows] for span in piece.spans])
        for piece in entry.pieces
    }


def from_hf(entry: Entry, read: Callable[[str, int, int], Tensor]) -> Tensor:
    """The whole megatron tensor, without vocabulary padding.

    Args:
        read: returns rows [start, stop) of a Hugging Face tensor, given its name, start and stop.
    """
    return _rows(entry, read, 0, entry.shape[0])


def shard_from_hf(
    entry: Entry, read: Callable[[str, int, int], Tensor], tp_rank: int, tp: int, padded_rows: int | None = None
) -> Tensor:
    """One tensor-parallel rank's shard, reading only the rows that it holds.

    Args:
        read: as in `from_hf`.
        padded_rows: rows of the embedding with padding, over all ranks; padding is filled with zeros.

    Raises:
        CheckpointError: tensor parallelism does not divide the tensor.
    """
    if entry.tp_axis is None or tp == 1:
        full = from_hf(entry, read)
        return _padded(full, padded_rows) if entry.is_vocabulary else full
    if entry.tp_axis == 1:
        _check_divides(entry, entry.shape[1], tp)
        width = entry.shape[1] // tp
        return from_hf(entry, read)[:, tp_rank * width : (tp_rank + 1) * width].contiguous()
    if entry.is_vocabulary:
        rows = padded_rows or entry.shape[0]
        _check_divides(entry, rows, tp)
        start, stop = (min(entry.shape[0], rows // tp * r) for r in (tp_rank, tp_rank + 1))
        return _padded(_rows(entry, read, start, stop), rows // tp)
    halves = 2 if entry.gated else 1
    size = entry.shape[0] // halves
    _check_divides(entry, size, tp)
    count = size // tp
    return torch.cat(
        [
            _rows(entry, read, half * size + tp_rank * count, half * size + (tp_rank + 1) * count)
            for half in range(halves)
        ]
    )


def merge_shards(entry: Entry, shards: Sequence[Tensor]) -> Tensor:
    """The whole megatron tensor from the shards of all tensor-parallel ranks, without vocabulary padding."""
    if entry.tp_axis is None:
        return shards[0]
    if entry.gated:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(list(shards), dim=entry.tp_axis)[: entry.shape[0]]


def _rows(entry: Entry, read: Callable[[str, int, int], Tensor], start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the megatron tensor."""
    parts = []
    for name, hf_start, hf_stop in spans_between(entry, start, stop):
        parts.append(read(name, hf_start, hf_stop))
    if not parts:
        name = entry.pieces[0].hf_name
        return read(name, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def spans_between(entry: Entry, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """(Hugging Face name, first row, row after the last) of what makes up megatron rows [start, stop), in order."""
    spans = [(span, piece.hf_name) for piece in entry.pieces for span in piece.spans]
    for span, name in sorted(spans, key=lambda item: item[0].megatron_row):
        low, high = max(start, span.megatron_row), min(stop, span.megatron_row + span.rows)
        if low < high:
            yield name, span.hf_row + low - span.megatron_row, span.hf_row + high - span.megatron_row


def megatron_spans_between(piece: Piece, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) in the megatron tensor of Hugging Face rows [start, stop), in order."""
    for span in piece.spans:  # ascending in hf_row
        low, high = max(start, span.hf_row), min(stop, span.hf_row + span.rows)
        if low < high:
            yield span.megatron_row + low - span.hf_row, span.megatron_row + high - span.hf_row


def _padded(tensor: Tensor, rows: int | None) -> Tensor:
    if rows is None or rows == tensor.shape[0]:
        return tensor
    padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding])


def _check_divides(entry: Entry, size: int, tp: int) -> None:
    if size % tp:
        raise CheckpointError(f"tensor parallelism {tp} does not divide the {size} rows or columns of {entry.name}.")
