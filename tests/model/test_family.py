"""conf/model holds the Llamas of the herd as they were published, and the stages for them can be planned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from transformers import LlamaConfig

from megalong.config.schema import ModelConfig
from megalong.convert.table import hf_shapes
from megalong.model.llama import model_from_hf
from megalong.planning.plan import make_plan
from megalong.planning.workload import workload_of
from megalong.recipe.resolve import run_of
from megalong.rope.theta import RotaryPoint, stage_theta

# Parameters as the repositories of meta-llama on Hugging Face state them.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}
# The herd's config.json files (meta-llama/Llama-3.x-*), besides what all of them share.
HERD: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {"rope": 8.0, "intermediate_size": 14336},
    "llama3.1-70b": {"rope": 8.0, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "llama3.1-405b": {"rope": 8.0, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
    "llama3.2-1b": {"rope": 32.0, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "llama3.2-3b": {"rope": 32.0, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28},
}
HEADS = {"llama3.1-8b": 32, "llama3.1-70b": 64, "llama3.1-405b": 128, "llama3.2-1b": 32, "llama3.2-3b": 24}


def model(name: str) -> ModelConfig:
    stage = "65k" if name.startswith("llama3-") else "262k-from-131k"
    return run_of([f"+stage={stage}", f"model={name}", "topology=auto"], 64).config.model


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_weights_add_up_to_the_published_count(name):
    count = 0
    for shape in hf_shapes(model(name)).values():
        values = 1
        for size in shape:
            values *= size
        count += values
    assert count == PUBLISHED[name]


@pytest.mark.parametrize("name", list(HERD))
def test_a_model_file_is_the_herd_s_config_json(name):
    facts = dict(HERD[name])
    rope = {"rope_type": "llama3", "factor": facts.pop("rope"), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        **{"vocab_size": 128256, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
        **facts,
        num_attention_heads=HEADS[name],
        head_dim=64 if name == "llama3.2-1b" else 128,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=name.startswith("llama3.2"),
        rope_parameters={**rope, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
    )
    expected, found = asdict(model_from_hf(config.to_dict())), asdict(model(name))
    assert found.pop("name") == name
    expected.pop("name")
    assert found == expected


@pytest.mark.parametrize(
    ("stage", "name", "gpus"),
    [
        ("262k-70b", "llama3-70b", 512),
        ("524k-70b", "llama3-70b", 512),
        ("1048k-70b", "llama3-70b", 512),
        ("262k-from-131k", "llama3.1-8b", 32),
        ("524k-from-131k", "llama3.1-8b", 512),
        ("1048k-from-131k", "llama3.1-8b", 512),
        ("4194k", "llama3-8b", 512),
    ],
)
def test_the_layout_of_a_stage_for_it_fits_the_devices_that_it_asks_for(stage, name, gpus):
    run = run_of([f"+stage={stage}", f"model={name}", "cluster=l40s-64x8"])
    assert run.layout.world_size == gpus
    assert make_plan(workload_of(run), run.config.cluster).fits


def test_theta_goes_on_by_the_law_from_a_base_of_131k_tokens():
    base = previous = RotaryPoint(500000.0, 131072)
    for stage, factor in (("262k-from-131k", 4.0), ("524k-from-131k", 4.0), ("1048k-from-131k", 1.6)):
        run = run_of([f"+stage={stage}", "model=llama3.2-1b", "topology=auto"], 512)
        law: dict[str, Any] = {"window": run.seq_length, "head_dim": 64, "base": base, "previous": previous}
        assert run.theta == stage_theta("dynamic_ntk", **law, factor=factor, declared=None)
        assert run.rope_scaling is not None
        assert run.rope_scaling["rope_type"] == "llama3"
        previous = RotaryPoint(run.theta, run.seq_length)
