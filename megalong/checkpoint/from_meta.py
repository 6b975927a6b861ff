"""How does Meta's original layout become a Hugging Face directory? Row by row from one or several model-parallel files.

`consolidated.NN.pth` hold one model-parallel rank each (fairscale: column-parallel matrices are cut along rows,
row-parallel ones along columns), `params.json` the shape. Two things differ from Hugging Face besides names: Meta
rotates *neighbouring* channels, Hugging Face the two *halves* of a head, so the rows of the query and key projections
are permuted; and params.json does not state the window, nor the factor of Llama 3.1's rope scaling, which therefore
have to be given where they cannot be told.

Files are opened with `weights_only=True` (no code runs) and mapped, not loaded.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalong.checkpoint.hf import hf_shapes
from megalong.checkpoint.output import OutputFolder, Progress, row_blocks
from megalong.checkpoint.safetensors_dir import INDEX
from megalong.checkpoint.safetensors_plan import header, index_json, plan_shards
from megalong.checkpoint.to_hf import MAX_SHARD_SIZE, is_hf
from megalong.checkpoint.to_megatron import dtype_name, one_dtype
from megalong.config.schema import ModelConfig
from megalong.model.llama import model_to_hf
from megalong.runtime.errors import CheckpointError

# Meta's name inside a layer -> (Hugging Face's, axis that model parallelism cuts)
_LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_IGNORED = ("rope.freqs", ".inner_attention.rope.freqs")  # follow from params.json
_PERMUTED = ("q_proj", "k_proj")
_LLAMA3_VOCABULARY = 128256


class MetaDirectory:
    """Meta's files, opened and checked, read as Hugging Face tensors.

    Args:
        folder: directory with params.json and consolidated.*.pth.
        window: max_position_embeddings, where params.json cannot tell it.
        rope_factor: factor of Llama 3.1's (8) or 3.2's (32) rope scaling.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or mis-shaped.
    """

    def __init__(self, folder: Path, window: int | None = None, rope_factor: float | None = None) -> None:
        self.folder = folder
        params = _read_params(folder)
        files = sorted(folder.glob("consolidated.*.pth"))
        if not files:
            raise CheckpointError(f"{folder} holds no consolidated.*.pth: it is not in Meta's original layout.")
        expected = [f"consolidated.{n:02d}.pth" for n in range(len(files))]
        if [file.name for file in files] != expected:
            missing = sorted(set(expected) - {file.name for file in files})
            raise CheckpointError(f"{folder}: {', '.join(missing)} missing among the model-parallel files.")
        self._shards = [_load(file) for file in files]
        for file, shard in zip(files, self._shards, strict=True):
            if shard.keys() != self._shards[0].keys():
                other = sorted(shard.keys() ^ self._shards[0].keys())[0]
                raise CheckpointError(f"{file}: tensor {other} is not in all model-parallel files.")
        self.model = self._model(params, window, rope_factor)
        self._names = _names(self.model)
        self._check()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Hugging Face name -> dtype."""
        return {name: self._shards[0][meta].dtype for name, (meta, _) in self._names.items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a Hugging Face tensor."""
        meta, axis = self._names[name]
        parts = self._parts(name, meta)
        if axis is None:
            return parts[0][start:stop]
        if axis == 1:
            return torch.cat([part[start:stop] for part in parts], dim=1)
        rows = torch.arange(start, stop)
        if name.removesuffix(".weight").endswith(_PERMUTED):
            rows = _meta_rows(rows, self.model.head_dim)
        height = parts[0].shape[0]
        if len(parts) == 1:
            return parts[0][rows]
        found = torch.empty((stop - start, *parts[0].shape[1:]), dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            here = (rows // height == rank).nonzero()[:, 0]
            found[here] = part[rows[here] - rank * height]
        return found

    def _parts(self, name: str, meta: str) -> list[Tensor]:
        parts = [shard[meta] for shard in self._shards]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            # with fewer key heads than files, neighbouring files hold copies of one head
            copies = max(1, len(parts) // self.model.num_key_value_heads)
            parts = parts[::copies]
        return parts

    def _model(self, params: Mapping[str, Any], window: int | None, rope_factor: float | None) -> ModelConfig:
        where = self.folder / "params.json"
        try:
            heads, hidden = int(params["n_heads"]), int(params["dim"])
            layers, eps = int(params["n_layers"]), float(params["norm_eps"])
            kv_heads = int(params.get("n_kv_heads") or heads)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error} is missing or no number.") from error
        if "moe" in params or params.get("quantization_args"):
            raise CheckpointError(f"{where} describes experts or quantized weights: not a plain Llama.")
        scaled = bool(params.get("use_scaled_rope"))
        theta = float(params.get("rope_theta", 10000.0))
        if scaled and rope_factor is None:
            raise CheckpointError(f"{where}: use_scaled_rope without a factor. Give --rope-factor 8 (3.1) or 32 (3.2).")
        if window is None:
            if not scaled and theta == 10000.0:
                raise CheckpointError(
                    f"{where} does not state the window. Give --window 2048 (Llama 1) or 4096 (Llama 2)."
                )
            window = 131072 if scaled else 8192
        scaling = {
            "rope_type": "llama3",
            "factor": float(rope_factor or 0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        vocabulary = self._rows_of("output.weight", 0) or self._rows_of("tok_embeddings.weight", 0)
        is_llama3 = vocabulary == _LLAMA3_VOCABULARY
        return ModelConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=self._rows_of("layers.0.feed_forward.w1.weight", 0),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=int(params.get("head_dim") or hidden // heads),
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=scaling if scaled else None,
            max_position_embeddings=window,
            tie_word_embeddings=self._is_tied(),
            bos_token_id=128000 if is_llama3 else 1,
            eos_token_id=128001 if is_llama3 else 2,
        )

    def _rows_of(self, meta: str, axis: int) -> int:
        return sum(int(shard[meta].shape[axis]) for shard in self._shards) if meta in self._shards[0] else 0

    def _is_tied(self) -> bool:
        shard = self._shards[0]
        if "output.weight" not in shard:
            return True
        same = [torch.equal(s["output.weight"], s["tok_embeddings.weight"]) for s in self._shards]
        return all(same)

    def _check(self) -> None:
        known = {meta for meta, _ in self._names.values()} | {"output.weight"}
        for meta in self._shards[0]:
            if meta not in known and not meta.endswith(_IGNORED):
                raise CheckpointError(f"{self.folder}: tensor {meta} is unexpected; params.json describes no such one.")
        for name, shape in hf_shapes(self.model).items():
            meta, axis = self._names[name]
            if meta not in self._shards[0]:
                raise CheckpointError(f"{self.folder}: tensor {meta} is missing; params.json asks for it.")
            if name == "model.embed_tokens.weight" and self._shards[0][meta].shape[0] == shape[0]:
                axis = 1 if len(self._shards) > 1 else 0  # Llama 1 and 2 cut the embedding along its columns
                self._names[name] = (meta, axis)
            parts = self._parts(name, meta)
            found = list(parts[0].shape)
            if axis is not None:
                found[axis] *= len(parts)
            if tuple(found) != shape or any(part.shape != parts[0].shape for part in parts):
                raise CheckpointError(
                    f"{self.folder}: tensor {meta} has shape {found} over all files, but params.json asks for "
                    f"{list(shape)}."
                )


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
    meta = MetaDirectory(source, window, rope_factor)
    cast = one_dtype(meta.dtypes(), dtype, source)
    plans = plan_shards(hf_shapes(meta.model), cast, max_shard_size)
    with OutputFolder(target, sum(plan.nbytes(cast) for plan in plans), overwrite, is_hf, progress) as folder:
        for plan in plans:
            head = header(plan, cast)
            file = folder.file(plan.name, len(head) + plan.nbytes(cast))
            file.write(head)
            for name, shape in plan.tensors.items():
                for start, stop in row_blocks(shape[0], math.prod(shape[1:]) * cast.itemsize):
                    rows = meta.rows(name, start, stop).to(cast).contiguous()
                    file.write(rows.view(-1).view(torch.uint8).numpy().data)
            file.close()
        index = index_json(plans, cast)
        if index is not None:
            folder.small_file(INDEX, index.encode())
        if (source / "tokenizer.model").is_file():
            folder.small_file("tokenizer.model", (source / "tokenizer.model").read_bytes())
        config = model_to_hf(meta.model, dtype=dtype_name(cast))
        folder.small_file("config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _meta_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Meta's row of each Hugging Face row: channel `half * D/2 + i` of a head is Meta's channel `2 * i + half`."""
    head, channel = rows // head_dim, rows % head_dim
    half, pair = channel // (head_dim // 2), channel % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def _names(model: ModelConfig) -> dict[str, tuple[str, int | None]]:
    """Hugging Face name -> (Meta's name, axis that model parallelism cuts)."""
    names: dict[str, tuple[str, int | None]] = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 0),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("output.weight", 0),
    }
    for layer in range(model.num_hidden_layers):
        for meta, (hf, axis) in _LAYER_NAMES.items():
            names[f"model.layers.{layer}.{hf}.weight"] = (f"layers.{layer}.{meta}.weight", axis)
    return {name: names[name] for name in hf_shapes(model)}


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return dict(params)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as plain tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} does not hold a dict of tensors.")
    return tensors
