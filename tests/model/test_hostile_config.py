"""Whatever a config.json says, it is one Llama of checked types, or one message that names the field."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.schema import ModelConfig
from megalong.convert.table import hf_shapes
from megalong.model.llama import model_from_hf, model_to_hf
from megalong.rope.frequencies import rotary_frequencies
from megalong.runtime.errors import CheckpointError, ThetaError, UserError
from megalong.runtime.json_file import shown
from tests.hostile import RAW, as_bytes, mutated, read_or_refused
from tests.model.test_llama import BASE, LLAMA3

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "truncate": True, "mscale": 1.0}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 2048,
}
FULL = {**BASE, "head_dim": 16, "tie_word_embeddings": True, "attention_bias": False, "initializer_range": 0.02}
DOCUMENTS = [
    {**FULL, "rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    {**FULL, "rope_scaling": YARN},
    {**FULL, "rope_scaling": LONG},
    {**FULL, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "original_max_position_embeddings": 2048},
]
BIG = 10**400


def read(folder: Path, document: Any) -> ModelConfig:
    (folder / "config.json").write_bytes(as_bytes(document))
    return model_from_hf(folder)


def types_are_right(model: ModelConfig) -> bool:
    ints = (
        model.vocab_size,
        model.hidden_size,
        model.intermediate_size,
        model.num_hidden_layers,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_dim,
        model.max_position_embeddings,
    )
    flags = (model.tie_word_embeddings, model.attention_bias, model.mlp_bias)
    floats = (model.rms_norm_eps, model.rope_theta, model.initializer_range)
    return (
        all(type(n) is int and n > 0 for n in ints)
        and all(type(flag) is bool for flag in flags)
        and all(type(n) is float and n > 0 for n in floats)
    )


@settings(max_examples=300, deadline=None)
@given(document=st.sampled_from(DOCUMENTS).flatmap(mutated))
def test_any_change_of_a_config_gives_a_llama_or_one_message(tmp_path_factory, document):
    model, refused = read_or_refused(lambda: read(Path(tmp_path_factory.getbasetemp()), document))
    if refused:
        assert "config.json" in refused
        return
    assert types_are_right(model)
    assert model_from_hf(json.loads(json.dumps(model_to_hf(model), allow_nan=False))).rope_theta == model.rope_theta
    window = {"max_position_embeddings": model.max_position_embeddings}
    frequencies, _ = rotary_frequencies(model.rope_theta, model.head_dim, model.rope_scaling, **window)
    assert bool(frequencies.isfinite().all())


@pytest.mark.parametrize("value", ["16", 16.0, 0, -2, 15, True, 2**31, BIG, [16], RAW[3]], ids=shown)
def test_a_head_dimension_that_is_none_is_refused(tmp_path, value):
    with pytest.raises(UserError, match=r"config\.json"):
        read(tmp_path, {**FULL, "head_dim": value})


SIZES = ("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "max_position_embeddings", "vocab_size")


@pytest.mark.parametrize("value", [0, -1, "4", True, 4.0, 3_000_000_000, BIG, {}], ids=shown)
@pytest.mark.parametrize("key", SIZES)
def test_a_size_that_is_no_sensible_count_is_refused(tmp_path, key, value):
    with pytest.raises(CheckpointError, match=rf"config\.json: {key}="):
        read(tmp_path, {**FULL, key: value})


def test_three_million_layers_are_refused_before_tables_are_made(tmp_path):
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"num_hidden_layers=3000000 must be .* at most 1,024"):
        read(tmp_path, {**FULL, "num_hidden_layers": 3_000_000})
    largest = {**FULL, "num_hidden_layers": 1024, "num_attention_heads": 1024, "num_key_value_heads": 64}
    assert len(hf_shapes(read(tmp_path, {**largest, "head_dim": 2}))) > 9 * 1024
    assert time.monotonic() - begun < 30


REFUSED: dict[str, tuple[type[UserError], list[Any]]] = {
    "rms_norm_eps": (CheckpointError, ["1e-5", -1e-5, 0, None, True, 2.0, BIG, []]),
    "initializer_range": (CheckpointError, ["0.02", -1.0, None, BIG]),
    "rope_theta": (ThetaError, ["500000", True, [500000.0], {}, BIG, 1.0, -5.0, 1e300]),
    "tie_word_embeddings": (CheckpointError, ["false", "true", 0, 1, []]),
    "attention_bias": (CheckpointError, ["false", 0, {}]),
    "mlp_bias": (CheckpointError, ["false", 1]),
    "bos_token_id": (CheckpointError, ["1", -1, 1.0, [1], True, BIG]),
    "eos_token_id": (CheckpointError, ["2", -1, 2.5, [2, "3"], [[2]], False, {}, []]),
    "architectures": (CheckpointError, ["LlamaForCausalLM", 3, {"LlamaForCausalLM": 1}, [["LlamaForCausalLM"]]]),
    "model_type": (CheckpointError, [3, ["llama"], {}]),
    "rope_scaling": (ThetaError, ["linear", 3, [1], True]),
    "rope_parameters": (ThetaError, ["default", {"rope_type": "default", "rope_theta": [1]}]),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, (_, values) in REFUSED.items() for value in values], ids=shown
)
def test_a_field_of_a_wrong_type_or_value_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(REFUSED[key][0], match=key):
        read(tmp_path, {**FULL, key: value})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": ["linear"]},
        {"rope_type": {"a": 1}},
        {"rope_type": 3},
        {"type": ["yarn"]},
        {"factor": "4"},
        {"factor": BIG},
        {"factor": True},
        {"attention_factor": -1.0},
        {"mscale": "1"},
        {"truncate": None},
        {"truncate": "false"},
        {"original_max_position_embeddings": True},
        {"original_max_position_embeddings": BIG},
        {"beta_fast": []},
        {"rope_theta": "500000"},
        {"factor": {"a": 1}},
    ],
    ids=str,
)
def test_a_rope_dict_of_wrong_types_is_refused(tmp_path, change):
    with pytest.raises(ThetaError, match=r"config\.json"):
        read(tmp_path, {**FULL, "rope_scaling": {**YARN, **change}})


@pytest.mark.parametrize(
    "rope",
    [
        {**LONG, "short_factor": [0.0] * 8},
        {**LONG, "original_max_position_embeddings": 1},
        {"rope_type": "linear", "factor": 1e-308},
        {"rope_type": "linear", "factor": 1e308},
    ],
    ids=["divided by zero", "no logarithm", "infinite", "nothing turns"],
)
def test_frequencies_that_cannot_be_computed_with_are_refused(tmp_path, rope):
    with pytest.raises(ThetaError, match=r"config\.json: rope_type="):
        read(tmp_path, {**FULL, "rope_scaling": rope})


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("key", ["rope_theta", "unknown"])
def test_what_is_no_json_is_refused_wherever_it_stands(tmp_path, key, raw):
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read(tmp_path, {**FULL, key: raw})


def test_a_field_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FULL)[:-1] + ', "rope_theta": 10000.0}')
    with pytest.raises(CheckpointError, match="rope_theta appears twice"):
        model_from_hf(tmp_path)


def test_a_null_means_what_it_means_to_transformers(tmp_path):
    model = read(tmp_path, {**FULL, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": None})
    assert (model.num_key_value_heads, model.head_dim, model.tie_word_embeddings) == (4, 16, False)
