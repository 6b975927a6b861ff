"""Meta's original layout converts to the Hugging Face model that computes the same, from one file or several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from megalong.convert.meta_dir import MetaDirectory
from megalong.convert.to_hf import meta_to_hf
from megalong.convert.to_megatron import hf_to_megatron, write_megatron
from megalong.convert.weights import open_weights
from megalong.runtime.errors import CheckpointError

DIM, HEADS, KV_HEADS, WIDE, VOCAB, LAYERS, THETA = 32, 4, 2, 48, 40, 2, 500000.0
PARAMS = {"dim": DIM, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "n_layers": LAYERS, "norm_eps": 1e-5}


def meta_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    kv = KV_HEADS * DIM // HEADS
    tensors = {"tok_embeddings.weight": random(VOCAB, DIM), "norm.weight": 1 + random(DIM)}
    tensors |= {"output.weight": random(VOCAB, DIM), "rope.freqs": torch.ones(DIM // HEADS // 2)}
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        tensors |= {
            f"{prefix}attention.wq.weight": random(DIM, DIM),
            f"{prefix}attention.wk.weight": random(kv, DIM),
            f"{prefix}attention.wv.weight": random(kv, DIM),
            f"{prefix}attention.wo.weight": random(DIM, DIM),
            f"{prefix}feed_forward.w1.weight": random(WIDE, DIM),
            f"{prefix}feed_forward.w2.weight": random(DIM, WIDE),
            f"{prefix}feed_forward.w3.weight": random(WIDE, DIM),
            f"{prefix}attention_norm.weight": 1 + random(DIM),
            f"{prefix}ffn_norm.weight": 1 + random(DIM),
        }
    return tensors


def write(
    folder: Path, tensors: dict[str, torch.Tensor], files: int, embedding_axis: int = 0, **params: object
) -> Path:
    """Write the files as Meta's own training code would, cut by fairscale's rules."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**PARAMS, "rope_theta": THETA, **params}))
    for rank in range(files):
        part = {}
        for name, tensor in tensors.items():
            if "norm" in name or "rope" in name:
                part[name] = tensor
            elif name.endswith(("wk.weight", "wv.weight")) and files > KV_HEADS:
                part[name] = tensor.chunk(KV_HEADS)[rank * KV_HEADS // files].clone()
            else:
                axis = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
                axis = embedding_axis if name.startswith("tok") else axis
                part[name] = tensor.chunk(files, dim=axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_logits(tensors: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Llama as Meta's model.py computes it: neighbouring channels are a complex number that is turned."""
    dim, length = DIM // HEADS, len(tokens)
    frequencies = THETA ** -(torch.arange(0, dim, 2).float() / dim)
    turn = torch.polar(torch.ones(1), torch.outer(torch.arange(length).float(), frequencies))[:, None]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.view(length, -1, dim // 2, 2)) * turn).flatten(2)

    h = tensors["tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        w = {k.removeprefix(f"layers.{layer}."): v for k, v in tensors.items() if k.startswith(f"layers.{layer}.")}
        x = norm(h, f"layers.{layer}.attention_norm.weight")
        q, k = (rotate(x @ w[f"attention.w{n}.weight"].T) for n in "qk")
        v = (x @ w["attention.wv.weight"].T).view(length, -1, dim)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
        scores += torch.full((length, length), float("-inf")).triu(1)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, -1)
        h = h + mixed @ w["attention.wo.weight"].T
        x = norm(h, f"layers.{layer}.ffn_norm.weight")
        gate = torch.nn.functional.silu(x @ w["feed_forward.w1.weight"].T)
        h = h + (gate * (x @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
    return norm(h, "norm.weight") @ tensors["output.weight"].T


@pytest.mark.parametrize(("files", "embedding_axis"), [(1, 0), (2, 0), (2, 1), (4, 0)])
def test_the_converted_model_computes_what_metas_does(tmp_path, files, embedding_axis):
    tensors, tokens = meta_tensors(), torch.arange(20) * 7 % VOCAB
    source = write(tmp_path / "meta", tensors, files, embedding_axis)
    (source / "tokenizer.model").write_bytes(b"tokens")
    meta_to_hf(source, tmp_path / "hf", max_shard_size=10_000)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ours, theirs = model(tokens[None]).logits[0], meta_logits(tensors, tokens)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == b"tokens"
    with open_weights(tmp_path / "hf") as weights:
        assert (weights.model.max_position_embeddings, weights.model.rope_theta) == (8192, THETA)
        assert not weights.model.tie_word_embeddings


def test_several_files_give_the_bytes_of_one(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in meta_tensors().items()}
    for files in (1, 2, 4):
        meta_to_hf(write(tmp_path / f"meta{files}", tensors, files), tmp_path / f"hf{files}")
    written = [(tmp_path / f"hf{files}" / "model.safetensors").read_bytes() for files in (1, 2, 4)]
    assert written[0] == written[1] == written[2]


def test_the_way_over_hugging_face_gives_the_bytes_of_the_direct_one(tmp_path):
    source = write(tmp_path / "meta", meta_tensors(), 2)
    with MetaDirectory(source) as meta:
        write_megatron(meta, tmp_path / "direct", torch.bfloat16)
    meta_to_hf(source, tmp_path / "hf", dtype="bfloat16")
    hf_to_megatron(tmp_path / "hf", tmp_path / "over")
    files = [".metadata", *(f"__0_{n}.distcp" for n in range(LAYERS + 2))]
    assert all((tmp_path / "direct" / f).read_bytes() == (tmp_path / "over" / f).read_bytes() for f in files)
    assert len(list((tmp_path / "direct").glob("*.distcp"))) == LAYERS + 2


def test_an_output_equal_to_the_embedding_is_tied(tmp_path):
    tensors = meta_tensors()
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    scaled = {"use_scaled_rope": True}
    meta_to_hf(write(tmp_path / "meta", tensors, 1, **scaled), tmp_path / "hf", rope_factor=32.0)
    with open_weights(tmp_path / "hf") as weights:
        assert weights.model.tie_word_embeddings
        assert weights.model.rope_scaling is not None
        assert (weights.model.rope_scaling["factor"], weights.model.max_position_embeddings) == (32.0, 131072)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"use_scaled_rope": True}, "--rope-factor 8"),
        ({"rope_theta": 10000.0}, "--window 2048"),
        ({"n_layers": 3}, r"layers\.2\..*is missing"),
        ({"n_layers": 1}, r"layers\.1\..*is unexpected"),
        ({"n_heads": None}, "missing or no number"),
        ({"moe": {"experts": 8}}, "experts"),
    ],
)
def test_what_params_json_leaves_open_or_contradicts_is_refused(tmp_path, params, said):
    with pytest.raises(CheckpointError, match=said):
        meta_to_hf(write(tmp_path / "meta", meta_tensors(), 1, **params), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path):
    tensors = meta_tensors()
    tensors["layers.1.feed_forward.w2.weight"][3, 5] = float("nan")
    tensors["output.weight"][7, 2] = 1e30
    source = write(tmp_path / "meta", tensors, 2)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight has 1 of .* at \[3, 5\]: nan"):
        meta_to_hf(source, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has the value 1e\+30 at \[7, 2\], which becomes inf"):
        meta_to_hf(source, tmp_path / "hf", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["meta"]


class Planted:
    """An object that only unpickling with code could bring back."""


def test_a_missing_file_and_a_pickle_with_code_are_refused(tmp_path):
    source = write(tmp_path / "meta", meta_tensors(), 2)
    (source / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth missing"):
        meta_to_hf(source, tmp_path / "hf")
    torch.save({"norm.weight": Planted()}, source / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth cannot be read as plain tensors"):
        meta_to_hf(source, tmp_path / "hf")
