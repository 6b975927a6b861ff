"""FLOP counts agree with the published rule and with the operators that a forward pass really executes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megalong.config.schema import ModelConfig
from megalong.model.flops import (
    hardware_flops_per_token,
    matmul_weights,
    model_flops_per_step,
    model_flops_per_token,
)

LLAMA = ModelConfig()


def test_matmul_weights_of_llama_3_8b():
    # 8,030,261,248 parameters less the embedding (128256 * 4096) and 65 norms of 4096.
    assert matmul_weights(LLAMA).total == 8_030_261_248 - 128256 * 4096 - 65 * 4096


def test_model_flops_follow_the_palm_rule_with_the_causal_half():
    window = 65536
    rule = 6 * matmul_weights(LLAMA).total + 6 * LLAMA.num_hidden_layers * LLAMA.hidden_size * (window + 1)
    assert model_flops_per_token(LLAMA, window) == rule
    assert model_flops_per_step(LLAMA, window, 32) == rule * window * 32


def test_recompute_only_adds_to_what_is_executed():
    by_policy = [hardware_flops_per_token(LLAMA, 8192, policy) for policy in ("none", "selective", "full")]
    assert model_flops_per_token(LLAMA, 8192) < by_policy[0] < by_policy[1] < by_policy[2]


def test_matmul_flops_equal_those_counted_in_a_real_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(
        **{n: getattr(shape, n) for n in names}, num_key_value_heads=2, head_dim=8, attn_implementation="eager"
    )
    tokens = torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(config)(tokens, use_cache=False)
    # The eager model computes the whole square of scores: 4*H*D*L per token and layer.
    square = 2 * 4 * 32 * 16
    assert counter.get_total_flops() / 16 == pytest.approx(2 * matmul_weights(shape).total + square)
