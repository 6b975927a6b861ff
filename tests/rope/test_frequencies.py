"""Rotary frequencies are transformers' own, bit for bit, for every rope type; incomplete dicts are refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.rope.frequencies import rotary_frequencies
from megalong.runtime.errors import ThetaError

WINDOW = 4096


def scaling_strategy(head_dim: int) -> st.SearchStrategy:
    factor = st.floats(1.0, 64.0)
    original = st.sampled_from([256, 1024, 4096])
    half = st.lists(st.floats(1.0, 50.0), min_size=head_dim // 2, max_size=head_dim // 2)
    return st.one_of(
        st.none(),
        st.just({"rope_type": "default"}),
        st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": factor}),
        st.fixed_dictionaries({"rope_type": st.just("dynamic"), "factor": factor}),
        st.fixed_dictionaries(
            {"rope_type": st.just("yarn"), "factor": factor, "original_max_position_embeddings": original},
            optional={
                "attention_factor": st.floats(0.5, 2.0),
                "beta_fast": st.floats(8.0, 64.0),
                "beta_slow": st.floats(0.5, 4.0),
                "mscale": st.floats(0.5, 2.0),
                "mscale_all_dim": st.floats(0.5, 2.0),
                "truncate": st.booleans(),
            },
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("longrope"),
                "short_factor": half,
                "long_factor": half,
                "original_max_position_embeddings": original,
            },
            optional={"factor": factor, "attention_factor": st.floats(0.5, 2.0)},
        ),
        st.fixed_dictionaries(
            {
                "rope_type": st.just("llama3"),
                "factor": factor,
                "low_freq_factor": st.floats(0.5, 2.0),
                "high_freq_factor": st.floats(3.0, 8.0),
                "original_max_position_embeddings": original,
            }
        ),
    )


@settings(max_examples=120, deadline=None)
@given(data=st.data(), head_dim=st.sampled_from([4, 16, 64, 128]), theta=st.floats(1e3, 4e9))
def test_frequencies_equal_transformers_bit_for_bit(data, head_dim, theta):
    scaling = data.draw(scaling_strategy(head_dim))
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    )
    reference = LlamaRotaryEmbedding(config)
    # One position inside every window, then one far beyond: the types that depend on length switch in the forward pass.
    for sequence_length in (128, 3 * WINDOW + 1):
        reference(torch.zeros(1), torch.tensor([[sequence_length - 1]]))
        inv_freq, attention_factor = rotary_frequencies(
            theta, head_dim, scaling, max_position_embeddings=WINDOW, sequence_length=sequence_length
        )
        assert inv_freq.dtype == torch.float32
        assert inv_freq.shape == (head_dim // 2,)
        assert torch.equal(inv_freq, reference.inv_freq)
        assert attention_factor == reference.attention_scaling


def test_the_older_spelling_of_the_type_is_read():
    old = rotary_frequencies(1e4, 16, {"type": "linear", "factor": 2.0}, max_position_embeddings=WINDOW)
    new = rotary_frequencies(1e4, 16, {"rope_type": "linear", "factor": 2.0}, max_position_embeddings=WINDOW)
    assert torch.equal(old[0], new[0])


@pytest.mark.parametrize(
    ("theta", "scaling", "said"),
    [
        (None, {"rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 8192}, "no rope_theta"),
        (5e5, {"rope_type": "yarn", "factor": 128.0}, "needs original_max_position_embeddings"),
        (5e5, {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor, high_freq_factor"),
        (5e5, {"rope_type": "linear"}, "needs factor"),
        (5e5, {"factor": 8.0}, "no rope_type"),
        (5e5, {"rope_type": "su"}, "'su' is not supported"),
        (5e5, {"rope_type": "linear", "type": "dynamic", "factor": 2.0}, "two types"),
        (5e5, {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}, "no field mrope_section"),
        (5e5, {"rope_type": "linear", "factor": -2.0}, "factor=-2.0"),
        (5e5, {"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (0.0, None, "above 1"),
    ],
)
def test_an_incomplete_or_strange_rope_dict_is_refused(theta, scaling, said):
    with pytest.raises(ThetaError, match=said):
        rotary_frequencies(theta, 16, scaling, max_position_embeddings=WINDOW)
