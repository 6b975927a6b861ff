"""Which rows of which Hugging Face tensor make up a megatron-core tensor? The one table of names and shapes.

Every megatron-core tensor of a Llama is its Hugging Face tensors with rows (axis 0) put in another order; columns never
move. So the whole mapping is a list of *runs*: `rows` rows from `hf_row` on in one tensor are the rows from
`megatron_row` on in the other. Weights, biases, gradients and optimizer moments follow the same runs, whole tensors
and slices alike, and the table needs no model, no GPU and no file.

- `linear_qkv`: per query group `[its query heads, key head, value head]` (megatron/core/transformer/attention.py).
- `linear_fc1`: gate over up; over tensor-parallel ranks each half is cut by itself (megatron/core/transformer/mlp.py).
- On disk, norms carry the Transformer Engine spec's names in either layer spec, and a layer index is a leading axis.
- No rotary permutation: Hugging Face weights and megatron-core both rotate halves.

`load_hf_into` is the trainer's direct start: a rank reads only the rows that it holds, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalong.checkpoint.safetensors_dir import SafetensorsDirectory, Stored
from megalong.config.schema import ModelConfig
from megalong.runtime.errors import CheckpointError

LAYERS = "decoder.layers."
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
TIED_OUTPUT = "lm_head.weight"
ROTARY_TABLE = ".rotary_emb.inv_freq"  # older transformers saved this table, which follows from the config

# Names of parameters in the local layer spec -> names on disk (those of the Transformer Engine spec).
LOCAL_SPEC_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class Run(NamedTuple):
    """`rows` consecutive rows that stay together."""

    hf_row: int
    megatron_row: int
    rows: int


@dataclass(frozen=True)
class Piece:
    """The part of a megatron tensor that comes from one Hugging Face tensor."""

    hf_name: str
    rows: int
    """Rows of the Hugging Face tensor; all of them lie in `runs`."""
    runs: tuple[Run, ...]


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
    entries = [_same(EMBEDDING, "model.embed_tokens.weight", (model.vocab_size, model.hidden_size), tp_axis=0)]
    for layer in range(model.num_hidden_layers):
        entries += layer_table(model, layer)
    entries.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (model.hidden_size,)))
    if not model.tie_word_embeddings:
        entries.append(_same(OUTPUT, "lm_head.weight", (model.vocab_size, model.hidden_size), tp_axis=0))
    return entries


def layer_table(model: ModelConfig, layer: int) -> list[Entry]:
    """The megatron tensors of one layer (counted from 0)."""
    hidden, wide = model.hidden_size, model.intermediate_size
    heads_width = model.num_attention_heads * model.head_dim
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    entries = [
        _same("self_attention.linear_qkv.layer_norm_weight", f"{prefix}input_layernorm.weight", (hidden,), layer),
        _qkv(model, layer, "weight", (hidden,)),
        _same("self_attention.linear_proj.weight", f"{attention}o_proj.weight", (hidden, heads_width), layer, 1),
        _same("mlp.linear_fc1.layer_norm_weight", f"{prefix}post_attention_layernorm.weight", (hidden,), layer),
        _gate_up(model, layer, "weight", (hidden,)),
        _same("mlp.linear_fc2.weight", f"{mlp}down_proj.weight", (hidden, wide), layer, 1),
    ]
    if model.attention_bias:
        entries.insert(2, _qkv(model, layer, "bias", ()))
        entries.insert(4, _same("self_attention.linear_proj.bias", f"{attention}o_proj.bias", (hidden,), layer))
    if model.mlp_bias:
        entries.insert(-1, _gate_up(model, layer, "bias", ()))
        entries.append(_same("mlp.linear_fc2.bias", f"{mlp}down_proj.bias", (hidden,), layer))
    return entries


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint."""
    return {piece.hf_name: entry.hf_shape(piece) for entry in table(model) for piece in entry.pieces}


def _same(
    name: str, hf_name: str, shape: tuple[int, ...], layer: int | None = None, tp_axis: int | None = None
) -> Entry:
    return Entry(name, layer, shape, (Piece(hf_name, shape[0], (Run(0, 0, shape[0]),)),), tp_axis)


def _qkv(model: ModelConfig, layer: int, kind: str, columns: tuple[int, ...]) -> Entry:
    groups, dim = model.num_key_value_heads, model.head_dim
    query = model.num_attention_heads // groups * dim  # rows of one group's query heads
    width = query + 2 * dim
    prefix = f"model.layers.{layer}.self_attn."

    def piece(name: str, start: int, count: int) -> Piece:
        runs = tuple(Run(g * count, g * width + start, count) for g in range(groups))
        return Piece(f"{prefix}{name}_proj.{kind}", groups * count, runs)

    pieces = (piece("q", 0, query), piece("k", query, dim), piece("v", query + dim, dim))
    return Entry(f"self_attention.linear_qkv.{kind}", layer, (groups * width, *columns), pieces, tp_axis=0)


def _gate_up(model: ModelConfig, layer: int, kind: str, columns: tuple[int, ...]) -> Entry:
    wide, prefix = model.intermediate_size, f"model.layers.{layer}.mlp."
    pieces = (
        Piece(f"{prefix}gate_proj.{kind}", wide, (Run(0, 0, wide),)),
        Piece(f"{prefix}up_proj.{kind}", wide, (Run(0, wide, wide),)),
    )
    return Entry(f"mlp.linear_fc1.{kind}", layer, (2 * wide, *columns), pieces, tp_axis=0, gated=True)


# Whole tensors and tensor-parallel shards -----------------------------------------------------------------------


def to_hf(entry: Entry, megatron: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors inside a whole megatron tensor (weights and gradients alike).

    Args:
        megatron: [rows (+ vocabulary padding), ...], without a layer axis.
    """
    return {
        piece.hf_name: torch.cat([megatron[run.megatron_row : run.megatron_row + run.rows] for run in piece.runs])
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
    for name, hf_start, hf_stop in runs_between(entry, start, stop):
        parts.append(read(name, hf_start, hf_stop))
    if not parts:
        name = entry.pieces[0].hf_name
        return read(name, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def runs_between(entry: Entry, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """(Hugging Face name, first row, row after the last) of what makes up megatron rows [start, stop), in order."""
    runs = [(run, piece.hf_name) for piece in entry.pieces for run in piece.runs]
    for run, name in sorted(runs, key=lambda item: item[0].megatron_row):
        low, high = max(start, run.megatron_row), min(stop, run.megatron_row + run.rows)
        if low < high:
            yield name, run.hf_row + low - run.megatron_row, run.hf_row + high - run.megatron_row


def megatron_runs_between(piece: Piece, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) in the megatron tensor of Hugging Face rows [start, stop), in order."""
    for run in piece.runs:  # ascending in hf_row
        low, high = max(start, run.hf_row), min(stop, run.hf_row + run.rows)
        if low < high:
            yield run.megatron_row + low - run.hf_row, run.megatron_row + high - run.hf_row


def _padded(tensor: Tensor, rows: int | None) -> Tensor:
    if rows is None or rows == tensor.shape[0]:
        return tensor
    padding = tensor.new_zeros((rows - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding])


def _check_divides(entry: Entry, size: int, tp: int) -> None:
    if size % tp:
        raise CheckpointError(f"tensor parallelism {tp} does not divide the {size} rows or columns of {entry.name}.")


# Parameters of a model -------------------------------------------------------------------------------------------


def entry_of_parameter(model: ModelConfig, name: str, first_layer: int = 0) -> Entry | None:
    """The entry of a parameter of a GPTModel, in either layer spec; None for names that hold no weight.

    Args:
        name: as `named_parameters()` or `state_dict()` give it; leading `module.` of wrappers are ignored.
        first_layer: number of this pipeline rank's first layer, counted from 0.

    Raises:
        CheckpointError: the name belongs to no tensor of a Llama.
    """
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name.endswith("._extra_state"):
        return None
    layer: int | None = None
    inner = name
    if name.startswith(LAYERS):
        number, inner = name.removeprefix(LAYERS).split(".", 1)
        layer = int(number) + first_layer
        inner = LOCAL_SPEC_NAMES.get(inner, inner)
        candidates = layer_table(model, layer)
    else:
        candidates = [entry for entry in table(model) if entry.layer is None]
        if model.tie_word_embeddings and name == OUTPUT:
            inner = EMBEDDING  # the last pipeline rank's own copy
    for entry in candidates:
        if entry.name == inner:
            return entry
    raise CheckpointError(f"parameter {name} has no counterpart in a Hugging Face Llama of this configuration.")


# Directories and models -----------------------------------------------------------------------------------------


def check_tensors(model: ModelConfig, tensors: Mapping[str, Stored], where: Path) -> None:
    """Check that a directory holds exactly a Llama's tensors, each with its right shape.

    A tied model may repeat its embedding as lm_head.weight, and old files may hold rotary tables: both are redundant.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped; it is named.
    """
    expected = hf_shapes(model)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name} {list(shape)} is missing; config.json asks for it.")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, but config.json asks for "
                f"{list(shape)}."
            )
    for name in tensors:
        tied = model.tie_word_embeddings and name == TIED_OUTPUT
        if name not in expected and not tied and not name.endswith(ROTARY_TABLE):
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} is unexpected; config.json describes no such one."
            )


def load_hf_into(model_chunks: Sequence[nn.Module], folder: Path, model: ModelConfig) -> None:
    """Fill this rank's parameters from a Hugging Face directory; values are cast to each parameter's dtype.

    Needs megatron's parallel state. Rows that only pad the vocabulary are set to zero.

    Args:
        model_chunks: what `megalong.model.gpt.build` returns, wrapped or not.
        folder: Hugging Face directory with *.safetensors.
        model: shape of the model.

    Raises:
        CheckpointError: the files are damaged or do not hold this model.
    """
    from megatron.core import parallel_state

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    with SafetensorsDirectory(Path(folder), verify=False) as source:
        check_tensors(model, source.tensors, Path(folder))
        for chunk in model_chunks:
            for name, parameter, entry in parameters_of(chunk, model):
                padded = parameter.shape[0] * tp if entry.is_vocabulary else None
                shard = shard_from_hf(entry, source.rows, tp_rank, tp, padded)
                if shard.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder}: {name} has shape {list(shard.shape)} on this rank, but the model has "
                        f"{list(parameter.shape)}."
                    )
                with torch.no_grad():
                    parameter.copy_(shard)


def parameters_of(chunk: nn.Module, model: ModelConfig) -> list[tuple[str, nn.Parameter, Entry]]:
    """(name, parameter, entry of the name table) of every parameter of a model chunk, wrapped or not."""
    inner = chunk
    while isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module  # type: ignore[assignment]
    layers = getattr(getattr(inner, "decoder", None), "layers", None)
    first_layer = layers[0].layer_number - 1 if layers is not None and len(layers) else 0
    found = []
    for name, parameter in inner.named_parameters():
        entry = entry_of_parameter(model, name, first_layer)
        if entry is not None:
            found.append((name, parameter, entry))
    return found
