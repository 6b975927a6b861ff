"""A stage's rope scaling turns on every rank as transformers turns it from the exported config."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.attention.zigzag import local_positions
from megalong.model.gpt import rope_of
from megalong.model.llama import model_to_hf, with_rope
from megalong.model.rotary import LocalRotaryEmbedding
from megalong.recipe.resolve import run_of
from megalong.recipe.rope import theta_warning
from megalong.run import Run
from megalong.runtime.errors import ConfigError, ThetaError

WINDOW = 2**20 + 4096
LONG = ", ".join(str(1.0 + i) for i in range(4))
SHORT = ", ".join("1.0" for _ in range(4))
SCALINGS = {
    "none": "null",
    "linear": "{rope_type: linear}",
    "yarn": "{rope_type: yarn}",
    "yarn of UltraLong": "{rope_type: yarn, beta_fast: 4, beta_slow: 1, factor: 128}",
    "llama3": "{rope_type: llama3}",
    "longrope": f"{{rope_type: longrope, short_factor: [{SHORT}], long_factor: [{LONG}]}}",
    "dynamic": "{rope_type: dynamic}",
}
HEAD = ["model.head_dim=8", "topology.tp=1", "topology.cp=1", "topology.pp=1", "topology.dp=1"]


def run_with(scaling: str, *words: str) -> Run:
    return run_of(
        [
            *("+stage=1048k", *HEAD, f"stage.seq_length={WINDOW}", "stage.theta=null"),
            *(f"stage.rope_scaling={scaling}", *words),
        ]
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_of_each_ranks_slice_are_those_of_transformers(name):
    run = run_with(SCALINGS[name])
    inv_freq, factor = rope_of(run)
    exported = with_rope(model_to_hf(run.model), run.theta, run.seq_length, run.rope_scaling)
    reference = LlamaRotaryEmbedding(LlamaConfig(**{k: exported[k] for k in exported if k != "dtype"}))
    asked = torch.cat((torch.arange(4096), torch.arange(2**20 - 2048, 2**20 + 4096)))  # its last one is the window's
    cos, sin = reference(torch.zeros(1, dtype=torch.float32), asked[None])
    for cp in (1, 2, 4):
        seen = 0
        for rank in range(cp):
            phases = LocalRotaryEmbedding(inv_freq, WINDOW, cp, rank)(WINDOW)[:, 0, 0]
            positions = local_positions(WINDOW, cp, rank)
            here = torch.isin(positions, asked)
            rows = torch.searchsorted(asked, positions[here])
            seen += len(rows)
            assert torch.allclose(phases[here].cos() * factor, cos[0, rows], rtol=0, atol=1e-6)
            assert torch.allclose(phases[here].sin() * factor, sin[0, rows], rtol=0, atol=1e-6)
        assert seen == len(asked)


def test_what_a_scaling_leaves_out_follows_from_the_windows():
    yarn = run_of(["+stage=65k", "+scale=mini", "stage.rope_scaling={rope_type: yarn}", "stage.theta_law=unchanged"], 1)
    assert yarn.rope_scaling == {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    assert yarn.theta == yarn.model.rope_theta
    assert yarn.rope_scaling_before is None
    own = run_of(["+stage=65k", "+scale=mini", "stage.rope_scaling={rope_type: linear, factor: 3}"], 1)
    assert own.rope_scaling == {"rope_type": "linear", "factor": 3}


def test_a_stage_keeps_the_scaling_of_its_weights_unless_it_says_otherwise():
    base = "model.rope_scaling={rope_type: linear, factor: 2.0}"
    kept = run_of(["+stage=65k", "+scale=mini", base], 1)
    assert kept.rope_scaling == kept.rope_scaling_before == {"rope_type": "linear", "factor": 2.0}
    off = run_of(["+stage=65k", "+scale=mini", base, "stage.rope_scaling={rope_type: default}"], 1)
    assert off.rope_scaling is None
    assert off.rope_scaling_before == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "error", "said"),
    [
        ("3", ConfigError, r"stage\.rope_scaling=3: give"),
        ("{rope_type: su}", ThetaError, "'su' is not supported"),
        ("{rope_type: longrope}", ThetaError, "needs short_factor, long_factor"),
        ("{rope_type: yarn, facktor: 2}", ThetaError, "has no field facktor"),
    ],
)
def test_an_incomplete_scaling_of_a_stage_is_refused(scaling, error, said):
    with pytest.raises(error, match=said):
        run_of(["+stage=65k", "+scale=mini", f"stage.rope_scaling={scaling}"], 1)


def test_a_stage_below_the_bound_is_told_and_the_cards_are_not():
    assert theta_warning(run_of(["+stage=1048k"])) is None
    unchanged = run_of(["+stage=65k", "stage.theta_law=unchanged", "stage.theta=null"])
    assert "lower bound for this window is 2,100,000" in (theta_warning(unchanged) or "")
    scaled = ["stage.rope_scaling={rope_type: linear}", "stage.theta_law=unchanged", "stage.theta=null"]
    assert theta_warning(run_of(["+stage=65k", *scaled])) is None
