"""A Hugging Face config is read strictly, and written so that every reader finds the same theta."""

import json

import pytest
from transformers import LlamaConfig

from megalong.config.schema import ModelConfig
from megalong.model.llama import model_from_hf, model_to_hf, with_rope
from megalong.runtime.errors import CheckpointError, ThetaError, UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}


def without(*keys: str) -> dict:
    return {k: v for k, v in BASE.items() if k not in keys}


def test_the_older_and_the_newer_spelling_mean_the_same():
    old = model_from_hf({**BASE, "rope_scaling": LLAMA3})
    new = model_from_hf({**without("rope_theta"), "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    both = model_from_hf({**BASE, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 500000}})
    assert old == new == both
    assert (old.rope_theta, old.rope_scaling, old.head_dim) == (500000.0, LLAMA3, 16)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3])
def test_readers_of_either_spelling_get_theta_and_window(scaling):
    model = ModelConfig(vocab_size=1000, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    model.rope_scaling = scaling
    hf = json.loads(json.dumps(model_to_hf(model, theta=2804339833.0, window=1048576, dtype="float32")))
    assert hf["rope_theta"] == 2804339833.0  # what transformers 4, vLLM and llama.cpp read
    assert hf["rope_parameters"]["rope_theta"] == 2804339833.0  # what transformers 5 reads
    assert hf["max_position_embeddings"] == 1048576
    for spelling in ("rope_parameters", "rope_theta"):
        alone = {k: v for k, v in hf.items() if not k.startswith("rope_") or k == spelling}
        if spelling == "rope_theta":
            alone["rope_scaling"] = hf["rope_scaling"]
        assert LlamaConfig(**alone).rope_parameters["rope_theta"] == 2804339833.0
        read = model_from_hf(alone)
        assert (read.rope_theta, read.rope_scaling, read.max_position_embeddings) == (2804339833.0, scaling, 1048576)
    assert LlamaConfig(**hf).rope_parameters == hf["rope_parameters"]


def test_writing_and_reading_gives_the_same_model():
    model = model_from_hf({**BASE, "rope_scaling": LLAMA3, "head_dim": 32, "attention_bias": True})
    assert model_from_hf(model_to_hf(model)) == model


def test_keys_that_the_model_does_not_define_are_carried():
    hf = model_to_hf(model_from_hf(BASE), carried={**BASE, "pad_token_id": 7, "unknown": [1]}, dtype="float16")
    assert (hf["pad_token_id"], hf["unknown"], hf["dtype"], hf["torch_dtype"]) == (7, [1], "float16", "float16")


def test_another_window_replaces_both_spellings():
    hf = with_rope({**BASE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 1e6, 65536)
    assert (hf["rope_theta"], hf["rope_parameters"]["rope_theta"], hf["max_position_embeddings"]) == (1e6, 1e6, 65536)


def test_llama_2_of_2023_has_theta_10000():
    assert model_from_hf(without("rope_theta")).rope_theta == 10000.0


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, CheckpointError, "MistralForCausalLM"),
        ({"architectures": None, "model_type": None}, CheckpointError, "names neither"),
        ({"hidden_act": "gelu"}, CheckpointError, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, CheckpointError, "attention_dropout=0.1"),
        ({"quantization_config": {"bits": 4}}, CheckpointError, "quantization_config"),
        ({"auto_map": {}}, CheckpointError, "auto_map"),
        ({"vocab_size": 0}, CheckpointError, "vocab_size=0"),
        ({"hidden_size": 66}, CheckpointError, "hidden_size=66"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads=3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ThetaError, "several rotary bases"),
        ({"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 2.0}}, ThetaError, "contradict"),
        ({"rope_scaling": {**LLAMA3}, "original_max_position_embeddings": 4096}, ThetaError, "4096 at the top level"),
        ({"rope_theta": None, "rope_scaling": LLAMA3}, ThetaError, "no rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 128.0}}, ThetaError, "original_max_position_embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ThetaError, "layer types"),
        ({"partial_rotary_factor": 0.5}, ThetaError, "partial_rotary_factor"),
    ],
)
def test_what_this_model_would_compute_differently_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        model_from_hf({**BASE, **change})
    assert issubclass(error, UserError)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        model_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: not JSON"):
        model_from_hf(tmp_path)
