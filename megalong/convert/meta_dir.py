"""What model lies in Meta's original layout? Its files, one or several, read as Hugging Face tensors.

`consolidated.NN.pth` hold one model-parallel rank each (fairscale: column-parallel matrices are cut along rows,
row-parallel ones along columns), `params.json` the shape. Two things differ from Hugging Face besides names: Meta
rotates *neighbouring* channels, Hugging Face the two *halves* of a head, so the rows of the query and key projections
are permuted; and params.json does not state the window, nor the factor of Llama 3.1's rope scaling, which therefore
have to be given where they cannot be told.

Files are mapped, not loaded, and no code in them is run (`torch_file`); every byte is compared with its checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalong.config.schema import ModelConfig
from megalong.convert.dtypes import dtype_name
from megalong.convert.safetensors_dir import NAMES
from megalong.convert.source import Source, TensorFacts
from megalong.convert.table import hf_shapes
from megalong.convert.torch_file import TorchFile
from megalong.model.llama import model_from_hf, model_to_hf
from megalong.rope.frequencies import is_number
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import read_json, shown

TOKENIZER = "tokenizer.model"
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
_EMBEDDING = "tok_embeddings.weight"
_LLAMA3_VOCABULARY = 128256


class MetaDirectory(Source):
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
        params = read_json(folder / "params.json", CheckpointError, "Download it again.")
        files = sorted(folder.glob("consolidated.*.pth"))
        if not files:
            raise CheckpointError(f"{folder} holds no consolidated.*.pth: it is not in Meta's original layout.")
        expected = [f"consolidated.{n:02d}.pth" for n in range(len(files))]
        if [file.name for file in files] != expected:
            missing = sorted(set(expected) - {file.name for file in files})
            raise CheckpointError(f"{folder}: {', '.join(missing)} missing among the model-parallel files.")
        self._files = [TorchFile(file) for file in files]
        first = self._files[0].tensors
        for file, held in zip(files, self._files, strict=True):
            if held.tensors.keys() != first.keys():
                other = sorted(held.tensors.keys() ^ first.keys())[0]
                raise CheckpointError(f"{file}: tensor {other} is not in all model-parallel files.")
            for name, tensor in held.tensors.items():
                used = not name.endswith(_IGNORED)
                if used and (tensor.dtype not in NAMES or len(tensor.shape) not in (1, 2)):
                    raise CheckpointError(
                        f"{file}: tensor {name} has dtype {dtype_name(tensor.dtype)} and shape "
                        f"{list(tensor.shape)}; a Llama's are vectors and matrices of {', '.join(NAMES.values())}."
                    )
        self.model = self._model(params, window, rope_factor)
        self._names = _names(self.model)
        self._check()
        self.tensors = {
            name: TensorFacts(shape, first[self._names[name][0]].dtype) for name, shape in hf_shapes(self.model).items()
        }
        self.config = model_to_hf(self.model)

    def carried(self) -> dict[str, bytes]:
        path = self.folder / TOKENIZER
        try:
            return {TOKENIZER: path.read_bytes()} if path.is_file() else {}
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error

    def finish(self) -> None:
        for file in self._files:
            file.check_all()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        meta, axis = self._names[name]
        shards = [file.tensor(meta) for file in self._sources(name)]
        if axis is None:
            return shards[0][start:stop]
        if axis == 1:
            return torch.cat([shard[start:stop] for shard in shards], dim=1)
        rows = torch.arange(start, stop)
        if name.removesuffix(".weight").endswith(_PERMUTED):
            rows = _meta_rows(rows, self.model.head_dim)
        height = shards[0].shape[0]
        if len(shards) == 1:
            return shards[0][rows]
        found = torch.empty((stop - start, *shards[0].shape[1:]), dtype=shards[0].dtype)
        for rank, shard in enumerate(shards):
            here = (rows // height == rank).nonzero()[:, 0]
            found[here] = shard[rows[here] - rank * height]
        return found

    def _sources(self, name: str) -> list[TorchFile]:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            # with fewer key heads than files, neighbouring files hold copies of one head
            copies = max(1, len(self._files) // self.model.num_key_value_heads)
            return self._files[::copies]
        return self._files

    def _model(self, params: Mapping[str, Any], window: int | None, rope_factor: float | None) -> ModelConfig:
        where = self.folder / "params.json"
        heads, hidden, layers = (_count(params, key, where) for key in ("n_heads", "dim", "n_layers"))
        kv_heads = heads if params.get("n_kv_heads") is None else _count(params, "n_kv_heads", where)
        if params.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"{where}: dim={hidden} is not a multiple of n_heads={heads}.")
        if "moe" in params or params.get("quantization_args"):
            raise CheckpointError(f"{where} describes experts or quantized weights: not a plain Llama.")
        scaled, theta = params.get("use_scaled_rope") or False, params.get("rope_theta", 10000.0)
        if not isinstance(scaled, bool) or not is_number(theta) or not is_number(params.get("norm_eps")):
            raise CheckpointError(
                f"{where}: use_scaled_rope={shown(scaled)} must be true or false, rope_theta={shown(theta)} and "
                f"norm_eps={shown(params.get('norm_eps'))} numbers."
            )
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
        vocabulary = self._rows_of("output.weight" if "output.weight" in self._files[0].tensors else _EMBEDDING, 0)
        is_llama3 = vocabulary == _LLAMA3_VOCABULARY
        model = ModelConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=self._rows_of("layers.0.feed_forward.w1.weight", 0),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=hidden // heads if params.get("head_dim") is None else _count(params, "head_dim", where),
            rms_norm_eps=params["norm_eps"],
            rope_theta=theta,
            rope_scaling=scaling if scaled else None,
            max_position_embeddings=window,
            tie_word_embeddings=self._is_tied(),
            bos_token_id=128000 if is_llama3 else 1,
            eos_token_id=128001 if is_llama3 else 2,
        )
        # the same ranges hold for every Llama, whichever layout it comes from
        return model_from_hf(model_to_hf(model), f"{where}, said as a config.json")

    def _rows_of(self, meta: str, axis: int) -> int:
        if meta not in self._files[0].tensors:
            raise CheckpointError(f"{self.folder}: tensor {meta} is missing; every Llama has it.")
        return sum(file.tensors[meta].shape[axis] for file in self._files)

    def _is_tied(self) -> bool:
        first = self._files[0].tensors
        if "output.weight" not in first or _EMBEDDING not in first:
            return True
        return all(torch.equal(file.tensor("output.weight"), file.tensor(_EMBEDDING)) for file in self._files)

    def _check(self) -> None:
        known = {meta for meta, _ in self._names.values()} | {"output.weight"}
        first = self._files[0].tensors
        for meta in first:
            if meta not in known and not meta.endswith(_IGNORED):
                raise CheckpointError(f"{self.folder}: tensor {meta} is unexpected; params.json describes no such one.")
        for name, shape in hf_shapes(self.model).items():
            meta, axis = self._names[name]
            if meta not in first:
                raise CheckpointError(f"{self.folder}: tensor {meta} is missing; params.json asks for it.")
            if name == "model.embed_tokens.weight" and first[meta].shape[0] == shape[0]:
                axis = 1 if len(self._files) > 1 else 0  # Llama 1 and 2 cut the embedding along its columns
                self._names[name] = (meta, axis)
            shards = [file.tensors[meta] for file in self._sources(name)]
            found = list(shards[0].shape)
            if axis is not None and len(found) == len(shape):
                found[axis] *= len(shards)
            if tuple(found) != shape or any(s.shape != shards[0].shape or s.dtype != shards[0].dtype for s in shards):
                raise CheckpointError(
                    f"{self.folder}: tensor {meta} has shape {found} over all files, or not one dtype, but params.json "
                    f"asks for {list(shape)}."
                )


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


def _count(params: Mapping[str, Any], key: str, where: Path) -> int:
    value = params.get(key)
    if type(value) is not int or not 1 <= value < 2**31:
        raise CheckpointError(f"{where}: {key}={shown(value)} is missing or no number to count with.")
    return value
