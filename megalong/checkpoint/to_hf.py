"""How does a megatron-core checkpoint become a Hugging Face directory? Row by row, without building a model.

What the trainer saves is read as it is: any layout, vocabulary padding cut off, optimizer left alone. config.json gets
theta and window of the checkpoint's stage in both spellings; tokenizer and generation files come from where the
weights once came from.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megalong.checkpoint.hf import Entry, Piece, hf_shapes, megatron_runs_between, table
from megalong.checkpoint.info import HF_FILES
from megalong.checkpoint.megatron_dir import MegatronDirectory
from megalong.checkpoint.output import BLOCK, OutputFolder, Progress, row_blocks
from megalong.checkpoint.pointer import resolve
from megalong.checkpoint.safetensors_dir import INDEX, SINGLE
from megalong.checkpoint.safetensors_plan import header, index_json, plan_shards
from megalong.checkpoint.to_megatron import dtype_name, one_dtype
from megalong.model.llama import model_from_hf, with_dtype
from megalong.runtime.errors import CheckpointError

MAX_SHARD_SIZE = 5 * 10**9


def megatron_to_hf(
    source: Path,
    target: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert a megatron-core checkpoint to a Hugging Face directory.

    Args:
        source: a checkpoint folder, or the run_dir of a training run (its newest whole checkpoint is taken).
        target: the directory to make.
        max_shard_size: bytes of one *.safetensors file.
        dtype: float32, bfloat16 or float16 to cast to; None: as it is, bit for bit.
        overwrite: replace an existing Hugging Face directory.
        progress: follows the writing.

    Raises:
        CheckpointError: the source is half-written, damaged or no Llama, or the target cannot be written.
    """
    with MegatronDirectory(resolve(source)) as checkpoint:
        where = f"{checkpoint.folder / 'megalong.json'}: hf_config"
        model = model_from_hf(checkpoint.info.hf_config, where)
        checkpoint.check_model(model)
        places = {piece.hf_name: (entry, piece) for entry in table(model) for piece in entry.pieces}
        cast = one_dtype({e.parameter: checkpoint.dtype(e) for e in table(model)}, dtype, checkpoint.folder)
        plans = plan_shards(hf_shapes(model), cast, max_shard_size)
        needed = sum(plan.nbytes(cast) for plan in plans)
        scratch = np.empty(BLOCK, dtype=np.uint8)
        with OutputFolder(target, needed, overwrite, is_hf, progress) as folder:
            for plan in plans:
                head = header(plan, cast)
                file = folder.file(plan.name, len(head) + plan.nbytes(cast))
                file.write(head)
                for name in plan.tensors:
                    entry, piece = places[name]
                    row_bytes = math.prod(entry.shape[1:]) * cast.itemsize
                    for start, stop in row_blocks(piece.rows, row_bytes):
                        data = scratch[: (stop - start) * row_bytes]
                        _fill(data, checkpoint, entry, piece, start, stop, cast)
                        file.write(data.data)
                file.close()
            checkpoint.finish()
            index = index_json(plans, cast)
            if index is not None:
                folder.small_file(INDEX, index.encode())
            _carry(checkpoint, folder)
            config = export_config(checkpoint, dtype_name(cast))
            folder.small_file("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def export_config(checkpoint: MegatronDirectory, dtype: str) -> dict[str, Any]:
    """config.json of an export: the checkpoint's own, with what only the original config knew (pad token, ...)."""
    original = _original_config(checkpoint.folder / HF_FILES / "config.json")
    original.pop("original_max_position_embeddings", None)  # lies in the rope dict of the checkpoint's config
    return with_dtype({**original, **checkpoint.info.hf_config}, dtype)


def is_hf(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model directory."""
    return (folder / "config.json").is_file() or (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _original_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    return dict(config)


def _carry(checkpoint: MegatronDirectory, folder: OutputFolder) -> None:
    carried = checkpoint.folder / HF_FILES
    for path in sorted(carried.iterdir()) if carried.is_dir() else []:
        if path.is_file() and path.name != "config.json":
            checkpoint.sums.check(f"{HF_FILES}/{path.name}")
            folder.small_file(path.name, path.read_bytes())


def _fill(
    data: Any, checkpoint: MegatronDirectory, entry: Entry, piece: Piece, start: int, stop: int, cast: torch.dtype
) -> None:
    stored = checkpoint.dtype(entry)
    row_bytes = math.prod(entry.shape[1:]) * cast.itemsize
    at = 0
    for first, last in megatron_runs_between(piece, start, stop):
        part = data[at : at + (last - first) * row_bytes]
        at += len(part)
        if stored == cast:
            checkpoint.read_into(entry, first, last, part)
        else:
            part[:] = checkpoint.rows(entry, first, last).to(cast).view(-1).view(torch.uint8).numpy()
    assert at == len(data), (piece.hf_name, at, len(data))
