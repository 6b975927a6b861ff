"""How does a model become a Hugging Face directory? Row by row, without building the model.

What the trainer saves is read as it is: any layout, vocabulary padding cut off, optimizer left alone. config.json gets
theta and window of the checkpoint's stage in both spellings; tokenizer and generation files come from where the
weights once came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from megalong.convert.blocks import Blocks
from megalong.convert.dtypes import dtype_name, one_dtype
from megalong.convert.hf_folder import CONFIG, is_hf
from megalong.convert.meta_dir import MetaDirectory
from megalong.convert.output_folder import OutputFolder, Progress
from megalong.convert.safetensors_dir import INDEX
from megalong.convert.safetensors_plan import header, index_json, plan_files
from megalong.convert.source import Source
from megalong.convert.table import hf_shapes
from megalong.convert.weights import MegatronWeights
from megalong.model.llama import with_dtype

MAX_SHARD_SIZE = 5 * 10**9


def megatron_to_hf(
    source: Path,
    target: Path,
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    texts: Mapping[str, bytes] | None = None,
) -> None:
    """Convert a megatron-core checkpoint to a Hugging Face directory.

    Args:
        source: a checkpoint folder, or the run_dir of a training run (its newest whole checkpoint is taken).
        target: the directory to make.
        max_shard_size: bytes of one *.safetensors file.
        dtype: float32, bfloat16 or float16 to cast to; None: as it is, bit for bit.
        overwrite: replace an existing Hugging Face directory.
        progress: follows the writing.
        texts: files for people that go along, such as a card and its pictures: name -> content.

    Raises:
        CheckpointError: the source is half-written, damaged, no Llama or not finite, or the target cannot be written.
    """
    with MegatronWeights(source) as weights:
        cast = one_dtype(weights.dtypes(), dtype, weights.folder)
        write_hf(weights, target, cast, max_shard_size, overwrite, progress, texts)


def meta_to_hf(
    source: Path,
    target: Path,
    window: int | None = None,
    rope_factor: float | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Convert Meta's original layout to a Hugging Face directory; arguments as in `MetaDirectory` and `megatron_to_hf`.

    A tokenizer.model is copied as it is; transformers' own tokenizer files are not made from it.

    Raises:
        CheckpointError: the source is damaged or not understood, or the target cannot be written.
    """
    with MetaDirectory(source, window, rope_factor) as meta:
        write_hf(meta, target, one_dtype(meta.dtypes(), dtype, source), max_shard_size, overwrite, progress)


def write_hf(
    source: Source,
    target: Path,
    dtype: torch.dtype,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress | None = None,
    texts: Mapping[str, bytes] | None = None,
) -> None:
    """Write a source's model as a Hugging Face directory; arguments as in `megatron_to_hf`."""
    plans = plan_files(hf_shapes(source.model), dtype, max_shard_size)
    needed = sum(plan.nbytes(dtype) for plan in plans)
    carried = source.carried()
    config = with_dtype(source.config, dtype_name(dtype))
    blocks = Blocks(source, dtype)
    with OutputFolder(target, needed, overwrite, is_hf, progress, source.folder) as folder:
        for plan in plans:
            head = header(plan, dtype)
            file = folder.file(plan.name, len(head) + plan.nbytes(dtype))
            file.write(head)
            for name in plan.tensors:
                for block in blocks.of_hf(name):
                    file.write(block.data)
            file.close()
        source.finish()
        index = index_json(plans, dtype)
        if index is not None:
            folder.small_file(INDEX, index.encode())
        for name, content in {**(texts or {}), **carried}.items():
            if name != CONFIG:
                folder.small_file(name, content)
        folder.small_file(CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
