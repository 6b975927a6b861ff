"""The list of weights counts what is known of published models, and needs no torch."""

import dataclasses
import subprocess
import sys

import pytest

from megalong.config.schema import ModelConfig
from megalong.model.shape import embedding, final_norm, layer_weights, output_layer, padded_vocab_size

LLAMA_8B = ModelConfig()
LLAMA_70B = dataclasses.replace(
    LLAMA_8B, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
)


@pytest.mark.parametrize(("model", "count"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)])
def test_the_weights_of_llama_3_add_up_to_the_published_count(model: ModelConfig, count: int) -> None:
    layer = sum(weight.numel for weight in layer_weights(model))
    outer = sum(weight.numel for weight in (embedding(model), final_norm(model), output_layer(model)))
    assert model.num_hidden_layers * layer + outer == count


def test_biases_exist_where_the_model_has_them_and_nowhere_else() -> None:
    biased = dataclasses.replace(LLAMA_8B, attention_bias=True)
    names = [weight.name for weight in layer_weights(biased) if weight.name.endswith("bias")]
    assert names == ["self_attention.linear_qkv.bias", "self_attention.linear_proj.bias"]
    assert not any(weight.name.endswith("bias") for weight in layer_weights(LLAMA_8B))


def test_padded_rows_divide_and_are_fewer_than_the_ranks() -> None:
    for tp in (1, 2, 3, 8):
        assert padded_vocab_size(4001, tp) % tp == 0
        assert 0 <= padded_vocab_size(4001, tp) - 4001 < tp


def test_the_list_loads_no_torch() -> None:
    code = "import sys; import megalong.model.shape; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
