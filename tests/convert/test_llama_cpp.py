"""llama.cpp itself computes from a converted GGUF what transformers computes, and cuts texts as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from megalong.convert.to_gguf import hf_to_gguf
from tests.convert.llama_cpp import LlamaCpp, needs_llama_cpp, quantize_chunk
from tests.convert.tokenizers_of_llamas import TEXTS, write_gpt2, write_llama3, write_sentencepiece
from tests.llamas import hf_config, save_hf

pytestmark = needs_llama_cpp
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 128}
# 1,024 + 5 tokens of the tokenizer, and some that it does not have
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries, own head_dim, biases": {"attention_bias": True, "mlp_bias": True},
    "tied, as many key heads as heads": {"num_key_value_heads": 8, "tie_word_embeddings": True},
    "one key head, llama3": {"num_key_value_heads": 1, "rope_scaling": {**LLAMA3, **ORIGINAL}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, **ORIGINAL}},
    "yarn, own factor": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3, **ORIGINAL}},
}
TOKENS = torch.randint(0, 1024, (8192,), generator=torch.Generator().manual_seed(3)).tolist()


def make(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random Llama with Llama 3's kind of tokenizer."""
    config = hf_config(**{"vocab_size": 1040, "num_hidden_layers": 2, "initializer_range": 0.2, **changes})
    save_hf(folder, config, dtype)
    write_llama3(folder)
    return folder


def log_probabilities(folder: Path, tokens: list[int], lengths: list[int]) -> np.ndarray:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0, [n - 1 for n in lengths]]
        return model.lm_head(hidden).log_softmax(-1).double().numpy()


def difference(folder: Path, gguf: Path, lengths: list[int], context: int = 512) -> float:
    """Largest relative difference (L2) of log-probabilities behind prompts of these lengths."""
    expected = log_probabilities(folder, TOKENS[: max(lengths)], lengths)
    with LlamaCpp(gguf, context) as llama:
        found = np.stack([llama.log_probabilities(TOKENS[:n], expected.shape[1]) for n in lengths])
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("shape", list(SHAPES))
def test_f32_logits_are_those_of_transformers(tmp_path, shape):
    folder = make(tmp_path / "hf", **SHAPES[shape])
    hf_to_gguf(folder, tmp_path / "model.gguf")
    assert difference(folder, tmp_path / "model.gguf", [1, 2, 40, 500]) < 1e-5


def test_logits_agree_at_both_ends_of_a_long_window_with_a_large_theta(tmp_path):
    folder = make(tmp_path / "hf", max_position_embeddings=8192, rope_theta=207112184.0, num_attention_heads=4)
    hf_to_gguf(folder, tmp_path / "model.gguf")
    assert difference(folder, tmp_path / "model.gguf", [1, 3, 8000, 8190], 8192) < 1e-4


def test_bf16_and_q8_0_files_load_and_differ_by_their_rounding(tmp_path):
    folder = make(tmp_path / "hf", torch.bfloat16)
    for kind, most in (("bf16", 0.01), ("q8_0", 0.01), ("f16", 0.002), ("q4_0", 0.15), ("q5_1", 0.08)):
        hf_to_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        found = difference(folder, tmp_path / f"{kind}.gguf", [3, 100])
        assert found < most, (kind, found)


def test_a_text_has_the_same_ids_in_llama_cpp(tmp_path):
    folder = make(tmp_path / "hf", vocab_size=1040)
    reference = AutoTokenizer.from_pretrained(folder)
    hf_to_gguf(folder, tmp_path / "model.gguf")
    said = {"user": "Where is the needle?", "assistant": "Behind you.", "system": "Turn."}
    chat = [{"role": role, "content": text} for role, text in said.items()]
    with LlamaCpp(tmp_path / "model.gguf", 128) as llama:
        for text in TEXTS:
            assert llama.ids(text) == reference(text)["input_ids"], text
        prompt = llama.post("/apply-template", messages=chat)["prompt"]
    expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt.removeprefix("<|begin_of_text|>") == expected.removeprefix("<|begin_of_text|>")


@pytest.mark.parametrize("kind", ["gpt-2", "llama 3 with merges", "sentencepiece json", "sentencepiece model"])
def test_other_tokenizers_cut_alike_too(tmp_path, kind):
    folder = tmp_path / "hf"
    save_hf(folder, hf_config(vocab_size=1040, num_hidden_layers=1))
    if kind.startswith("sentencepiece"):
        reference = write_sentencepiece(folder, kind.endswith("model"))
    else:
        if kind == "gpt-2":
            write_gpt2(folder)
        else:
            write_llama3(folder, model_changes={"ignore_merges": False})
        reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    hf_to_gguf(folder, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", 128) as llama:
        for text in TEXTS:
            assert llama.ids(text) == reference.encode(text).ids, text


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantized_bytes_are_those_of_llama_cpp_itself(kind):
    values = np.random.default_rng(1).standard_normal((64, 256), dtype=np.float32)
    values[0], values[1, :32] = 0.0, 1e-8
    values = torch.from_numpy(values).bfloat16().float().numpy()
    tensor_type = GGMLQuantizationType[kind.upper()]
    count, size = GGML_QUANT_SIZES[tensor_type]
    expected = quantize_chunk(values, tensor_type, values.size // count * size)
    assert quantize(values, tensor_type).tobytes() == expected


def test_the_window_is_the_one_that_llama_cpp_reads(tmp_path):
    folder = make(tmp_path / "hf", max_position_embeddings=4096, rope_theta=15296098.0)
    hf_to_gguf(folder, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", 64) as llama:
        facts = llama.get("/v1/models")["data"][0]["meta"]
    assert (facts["n_ctx_train"], facts["n_vocab"], facts["n_embd"]) == (4096, 1040, 64)
