"""A GGUF holds a model's weights bit for bit, its tokenizer and its window, and exists whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from megalong.commands.convert import app
from megalong.convert import output_folder
from megalong.convert.blocks import BLOCK, row_blocks
from megalong.convert.to_gguf import hf_to_gguf, megatron_to_gguf
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import open_weights
from megalong.runtime.errors import CheckpointError, UserError
from tests.convert.tokenizers_of_llamas import CHAT, TEXTS, write_llama3, write_sentencepiece
from tests.llamas import hf_config, save_hf
from tests.training.disks import small_disk

logging.disable_progress_bar()
SHAPES: list[dict[str, Any]] = [
    {"attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 8, "tie_word_embeddings": True, "rope_theta": 207112184.0},
    {"num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 12, "max_position_embeddings": 4096},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`: a model with a tokenizer in bf16; `megatron`: the same; `hf.gguf`: its conversion."""
    folder = tmp_path_factory.mktemp("gguf")
    save_hf(folder / "hf", hf_config(vocab_size=1040, num_hidden_layers=2), torch.bfloat16)
    write_llama3(folder / "hf")
    hf_to_megatron(folder / "hf", folder / "megatron")
    hf_to_gguf(folder / "hf", folder / "hf.gguf")
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "hf", tmp_path / "hf")
    return tmp_path


def tensors(gguf: Path) -> dict[str, torch.Tensor]:
    """Name -> values in fp32, as the gguf library reads them."""
    return {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in GGUFReader(gguf).tensors}


def said(gguf: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}


@pytest.mark.parametrize("changes", SHAPES)
def test_transformers_reads_the_same_f32_weights_bit_for_bit(tmp_path, changes):
    save_hf(tmp_path / "hf", hf_config(vocab_size=1040, **changes))
    write_llama3(tmp_path / "hf")
    hf_to_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    found = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    weights = expected.state_dict()
    biases = {name for name in weights if name.endswith("bias")}  # the loader's own model has none
    assert found.state_dict().keys() == weights.keys() - biases
    assert all(torch.equal(found.state_dict()[name], weights[name]) for name in found.state_dict())
    read = found.config
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(read, key) == getattr(expected.config, key)
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "hf"), said(tmp_path / "model.gguf")
    assert theirs["tokenizer.ggml.tokens"][:1029] == ours.convert_ids_to_tokens(range(1029))
    assert theirs["tokenizer.ggml.tokens"][1029:] == [f"[PAD{i}]" for i in range(1029, 1040)]
    assert theirs["tokenizer.chat_template"] == CHAT
    assert theirs["llama.rope.freq_base"] == torch.tensor(expected.config.rope_parameters["rope_theta"]).item()


def test_biases_are_permuted_with_their_rows(tmp_path):
    save_hf(tmp_path / "hf", hf_config(vocab_size=1040, attention_bias=True))
    write_llama3(tmp_path / "hf")
    hf_to_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    found = tensors(tmp_path / "model.gguf")
    with open_weights(tmp_path / "hf") as weights:
        for name, short in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
            bias = weights.whole(f"model.layers.1.self_attn.{name}.bias").view(-1, 2, 8)
            assert torch.equal(found[f"blk.1.{short}.bias"], bias.transpose(1, 2).reshape(-1))
        assert torch.equal(found["blk.1.attn_v.bias"], weights.whole("model.layers.1.self_attn.v_proj.bias"))


def test_tensors_are_cut_into_blocks_of_whole_heads_without_a_seam(made, tmp_path, monkeypatch):
    hf_to_gguf(made / "hf", tmp_path / "hf.gguf")
    assert (tmp_path / "hf.gguf").read_bytes() == (made / "hf.gguf").read_bytes()
    monkeypatch.setattr(
        "megalong.convert.blocks.row_blocks",
        lambda rows, size, unit: [(start, min(rows, start + unit)) for start in range(0, rows, unit)],
    )
    for kind in ("bf16", "q4_0"):
        hf_to_gguf(made / "hf", tmp_path / f"{kind}.gguf", kind)
    monkeypatch.undo()
    hf_to_gguf(made / "hf", tmp_path / "q4.gguf", "q4_0")
    assert (tmp_path / "bf16.gguf").stat().st_size == (made / "hf.gguf").stat().st_size
    for a, b in (("bf16.gguf", made / "hf.gguf"), ("q4_0.gguf", tmp_path / "q4.gguf")):
        assert all(torch.equal(tensor, tensors(b)[name]) for name, tensor in tensors(tmp_path / a).items())


@pytest.mark.parametrize("unit", [1, 16, 128])
def test_rows_of_a_head_stay_in_one_block_whatever_their_size(unit):
    for row_bytes in (1, 4096, 32768, 131072):
        pieces = list(row_blocks(unit * 40, row_bytes * unit, unit))
        assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])]
        assert pieces[-1][1] == unit * 40
        assert all(a % unit == b % unit == 0 and (b - a) * row_bytes <= BLOCK for a, b in pieces)


def test_a_checkpoint_gives_the_same_tensors_and_tokenizer_as_the_folder_it_came_from(made, tmp_path):
    megatron_to_gguf(made / "megatron", tmp_path / "m.gguf", "q8_0")
    hf_to_gguf(made / "hf", tmp_path / "h.gguf", "q8_0")
    a, b = tensors(tmp_path / "m.gguf"), tensors(tmp_path / "h.gguf")
    assert all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())
    ours, theirs = said(tmp_path / "m.gguf"), said(tmp_path / "h.gguf")
    own = {"general.name", "megalong.bytes", "megalong.step", "megalong.consumed_samples", "GGUF.kv_count"}
    assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
    assert theirs["general.file_type"] == 7
    assert theirs["general.quantization_version"] == 2


def test_each_tensor_has_the_type_that_is_asked_for(made, tmp_path):
    hf_to_gguf(made / "hf", tmp_path / "h.gguf", "Q4_0")
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "h.gguf").tensors}
    assert types["output.weight"] == "Q8_0"
    assert types["token_embd.weight"] == types["blk.1.ffn_down.weight"] == "Q4_0"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert {t.tensor_type.name for t in GGUFReader(made / "hf.gguf").tensors} == {"BF16", "F32"}


def test_the_front_of_the_card_goes_into_the_metadata(copy, capsys):
    front = "license: llama3\nbase_model: meta-llama/Meta-Llama-3-8B\ntags: [long-context]\nmodel_name: Long Llama\n"
    (copy / "hf" / "README.md").write_text(f"---\n{front}---\n# text\n")
    hf_to_gguf(copy / "hf", copy / "a.gguf")
    found = said(copy / "a.gguf")
    assert found["general.license"] == "llama3"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/Meta-Llama-3-8B"
    assert found["general.tags"] == ["long-context"]
    assert found["general.name"] == "Long Llama"
    (copy / "hf" / "README.md").write_text("---\nlicense: {a: [\n---\n")
    hf_to_gguf(copy / "hf", copy / "b.gguf")
    assert said(copy / "b.gguf")["general.name"] == "b"
    assert "The front of README.md is not understood" in capsys.readouterr().err


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0), "no name for this way of splitting"),
        (lambda raw: raw.update(normalizer={"type": "NFC"}), "it has a normalizer"),
        (lambda raw: raw["added_tokens"][-1].update(lstrip=True), "has lstrip"),
        (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
        (lambda raw: raw.update(pre_tokenizer=None), "neither byte-level BPE nor SentencePiece"),
        (lambda raw: raw.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "not BPE"),
        (lambda raw: raw.update(model=3), "is not a tokenizer"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(copy, change, words):
    edit(copy / "hf", change)
    refused(copy, words)


def test_merges_that_are_not_sentencepiece_s_are_refused(copy):
    for name in ("tokenizer.json", "chat_template.jinja"):
        (copy / "hf" / name).unlink()
    write_sentencepiece(copy / "hf", model=False)
    edit(copy / "hf", lambda raw: raw["model"]["merges"].pop(200))
    refused(copy, "never merge: these are not SentencePiece's merges")


def test_a_model_without_a_tokenizer_or_with_tiktoken_s_alone_is_refused(copy):
    (copy / "hf" / "tokenizer.json").unlink()
    refused(copy, "has no tokenizer, and a GGUF without one is of no use")
    (copy / "hf" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    refused(copy, "is not a BPE model of SentencePiece")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(copy):
    save_hf(copy / "hf", hf_config(vocab_size=1000, num_hidden_layers=1))
    refused(copy, "the tokenizer has ids up to 1028, the model 1000 tokens")


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type=dynamic cannot be said in a GGUF"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False},
            "truncate=false cannot be said",
        ),
    ],
)
def test_a_scaling_that_gguf_cannot_express_is_refused(copy, rope, words):
    path = copy / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_scaling": rope}))
    refused(copy, words)


def refused(copy: Path, words: str, kind: str | None = None) -> None:
    with pytest.raises(UserError, match=words):
        hf_to_gguf(copy / "hf", copy / "out.gguf", kind)
    assert sorted(path.name for path in copy.iterdir()) == ["hf"]


def test_values_that_are_not_finite_or_too_large_to_quantize_are_refused(copy):
    stored = load_file(copy / "hf" / "model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(stored, copy / "hf" / "model.safetensors", {"format": "pt"})
    refused(copy, r"holds .*; a value beyond 65504 cannot be quantized to q8_0", "q8_0")
    refused(copy, r"up_proj.*\[3, 4\].*float16", "f16")
    refused(copy, "--type q9: it is one of f32, f16, bf16", "q9")


def test_damage_is_found_and_leaves_nothing(made, tmp_path):
    shutil.copytree(made / "megatron", tmp_path / "megatron")
    path = max((tmp_path / "megatron").glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        megatron_to_gguf(tmp_path / "megatron", tmp_path / "out.gguf")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=path.name):
        megatron_to_gguf(tmp_path / "megatron", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["megatron"]


def test_two_conversions_to_one_file_cannot_run_at_once(made, tmp_path):
    with output_folder.OutputFolder(tmp_path / "a.gguf", 0, single=True) as folder:
        folder.small_file("a.gguf", b"whole")
        with pytest.raises(CheckpointError, match="another program is writing"):
            hf_to_gguf(made / "hf", tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == b"whole"


def test_a_name_that_was_taken_meanwhile_is_left_and_the_result_kept(made, tmp_path):
    def taken(count: int, total: int) -> None:
        (tmp_path / "a.gguf").write_text("mine")

    with pytest.raises(CheckpointError, match="Nothing is lost: the result is whole and lies in"):
        hf_to_gguf(made / "hf", tmp_path / "a.gguf", progress=taken)
    assert (tmp_path / "a.gguf").read_text() == "mine"
    made_file = tmp_path / "a.gguf.partial" / "new" / "a.gguf"
    assert tensors(made_file).keys() == tensors(made / "hf.gguf").keys()


def test_only_what_was_written_here_is_replaced(made, tmp_path):
    target = tmp_path / "a.gguf"
    target.write_bytes(b"GGUF, but a person's")
    with pytest.raises(CheckpointError, match="exists already"):
        hf_to_gguf(made / "hf", target)
    with pytest.raises(CheckpointError, match="is not what a conversion wrote"):
        hf_to_gguf(made / "hf", target, overwrite=True)
    assert target.read_bytes() == b"GGUF, but a person's"
    target.write_bytes((made / "hf.gguf").read_bytes()[:-40_000])  # cut off: not what was written
    with pytest.raises(CheckpointError, match="is not what a conversion wrote"):
        hf_to_gguf(made / "hf", target, overwrite=True)
    target.unlink()
    hf_to_gguf(made / "hf", target)
    hf_to_gguf(made / "hf", target, "q8_0", overwrite=True)
    assert said(target)["general.file_type"] == 7
    assert said(target)["megalong.bytes"] == target.stat().st_size
    with pytest.raises(CheckpointError, match="exists already and is a folder"):
        hf_to_gguf(made / "hf", made / "megatron", overwrite=True)
    with pytest.raises(CheckpointError, match="inside the source"):
        hf_to_gguf(made / "hf", made / "hf" / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_ends_with_one_message_and_nothing_left(made, tmp_path, monkeypatch, foreseen):
    if not foreseen:  # as when someone else fills it meanwhile
        usage = shutil.disk_usage("/")._replace(free=1 << 40)
        monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    with small_disk(tmp_path / "small", 1) as disk:
        (disk / "other").write_bytes(bytes(800 << 10))
        with pytest.raises(CheckpointError, match="GB free, but" if foreseen else "the disk .* is full"):
            hf_to_gguf(made / "hf", disk / "out.gguf")
        assert [path.name for path in disk.iterdir()] == ["other"]


def test_the_command_line_says_what_it_wrote(made, tmp_path):
    for command, source in (("hf-to-gguf", "hf"), ("megatron-to-gguf", "megatron")):
        out = tmp_path / f"{source}.gguf"
        result = CliRunner().invoke(app, [command, str(made / source), str(out), "--type", "q8_0"])
        assert result.exit_code == 0, result.output
        assert f"{out.stat().st_size / 1e6:,.1f} MB" in result.output
        again = CliRunner().invoke(app, [command, str(made / source), str(out)])
        assert again.exit_code == 2
        assert "exists already" in again.stderr


def test_the_texts_hold_what_tokenizers_disagree_about():
    joined = "".join(TEXTS)
    assert "<|eot_id|>" in joined
    assert any(ord(letter) > 0xFFFF for letter in joined)
