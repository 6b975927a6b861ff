"""Which tensor of a checkpoint is each parameter of a model? The table's entry of its name and layer, filled by rows.

`load_hf_into` is the trainer's direct start: a rank reads only the rows that it holds, one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from megalong.config.schema import ModelConfig
from megalong.convert.safetensors_dir import SafetensorsDirectory, check_tensors
from megalong.convert.table import LAYERS, LOCAL_SPEC_NAMES, Entry, layer_table, shard_from_hf, table
from megalong.model.shape import EMBEDDING, OUTPUT
from megalong.runtime.errors import CheckpointError
from megalong.runtime.watchdog import part


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


def load_hf_into(model_chunks: Sequence[nn.Module], folder: Path, model: ModelConfig) -> None:
    """Fill this rank's parameters from a Hugging Face directory; values are cast to each parameter's dtype.

    Needs megatron's parallel state. Rows that only pad the vocabulary are set to zero. A rank reads a part of the
    files, so their checksums are not compared here (`load.verify_checksums` does, all ranks together).

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
            found = parameters_of(chunk, model)
            for number, (name, parameter, entry) in enumerate(found, 1):
                part("tensor", number, len(found))
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
