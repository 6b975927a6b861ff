"""From overrides to one checked configuration: the card's numbers, scaling, layouts, and errors a user can act on."""

from copy import deepcopy
from dataclasses import asdict

import pytest

from megalong.recipe.compose import compose, from_yaml, to_yaml
from megalong.recipe.resolve import resolve, run_of
from megalong.runtime.errors import ConfigError, LayoutError, ThetaError, UserError
from megalong.topology.layout import Layout

CARD = {
    # window, theta, batch, steps, tokens, GPUs of the Llama-3-8B-Instruct-Gradient-1048k card
    "65k": (65_536, 15_296_098, 32, 30, 62_914_560, 8),
    "262k": (262_144, 207_112_184, 16, 24, 100_663_296, 32),
    "524k": (524_288, 1_062_356_830, 16, 50, 419_430_400, 512),
    "1048k": (1_048_576, 2_804_339_833, 16, 50, 838_860_800, 512),
    # the last row of the Llama-3-8B-Instruct-Gradient-4194k card
    "4194k": (4_194_304, 45_218_125_209, 4, 12, 201_326_592, 512),
    # theta of the revised 262k and 1048k models
    "262k-scaling": (262_144, 283_461_213, 16, 24, 100_663_296, 32),
    "1048k-scaling": (1_048_576, 3_580_165_449, 16, 50, 838_860_800, 512),
}


@pytest.mark.parametrize("stage", CARD)
def test_a_stage_is_the_cards_row_to_the_token(stage: str) -> None:
    run = run_of([f"+stage={stage}"])
    config = run.config
    window, theta, batch, steps, tokens, gpus = CARD[stage]
    assert (run.seq_length, run.theta, run.global_batch_size, run.steps, run.lr) == (window, theta, batch, steps, 2e-5)
    assert (config.stage.seq_length, config.stage.theta) == (window, theta)  # config.yaml says the same
    assert (config.train.global_batch_size, config.train.steps, config.train.lr) == (batch, steps, 2e-5)
    assert window * batch * steps == tokens
    assert run.layout.world_size == gpus


def test_mini_scale_divides_every_stage_by_the_same_factors_and_chains_its_own_theta() -> None:
    full = run_of(["+stage=1048k"])
    mini = run_of(["+stage=1048k", "+scale=mini"], world_size=4)
    scale = mini.config.scale
    assert mini.seq_length * scale.window == full.seq_length
    assert mini.steps == full.steps // scale.steps
    before = run_of(["+stage=524k", "+scale=mini"], world_size=4)
    assert mini.theta != full.theta
    assert mini.theta > before.theta > mini.model.rope_theta
    assert (mini.before.theta, mini.before.window) == (before.theta, before.seq_length)


def test_explicit_values_win_over_the_stage_and_its_scale() -> None:
    run = run_of(["+stage=65k", "+scale=mini", "train.steps=3", "train.global_batch_size=6", "train.lr=0.5"], 1)
    assert (run.steps, run.stop_after, run.global_batch_size, run.lr) == (3, 3, 6, 0.5)


def test_sizes_left_out_are_filled_in_for_the_ranks() -> None:
    run = run_of(["+stage=65k", "+scale=mini", "topology.tp=2", "topology.cp=2"], world_size=8)
    assert run.layout.world_size == 8
    assert (run.layout.tp, run.layout.cp) == (2, 2)
    assert asdict(run.layout) == {axis: getattr(run.config.topology, axis) for axis in ("tp", "cp", "pp", "dp")}


def test_what_the_user_said_stays_what_it_was() -> None:
    said = compose(["+stage=262k", "+scale=mini", "topology.tp=2"], 8)
    before = deepcopy(said)
    first, second = resolve(said, 8), resolve(said, 4)
    assert said == before
    assert (first.layout.world_size, second.layout.world_size) == (8, 4)


def test_all_four_sizes_given_are_taken_as_they_are() -> None:
    overrides = ["topology.tp=2", "topology.cp=2", "topology.pp=2", "topology.dp=1"]
    assert run_of(["+stage=65k", "+scale=mini", *overrides], 8).layout == Layout(2, 2, 2, 1)


def test_what_a_run_writes_down_reads_back_the_same() -> None:
    config = run_of(["+stage=262k", "+scale=mini", "model.rope_scaling={rope_type: linear, factor: 2.0}"], 4).config
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("overrides", "world_size", "error", "says"),
    [
        ([], 1, ConfigError, r"Which stage\?(.|\n)*\+stage=65k(.|\n)*\+stage=1048k"),
        (["+stage=2k"], 1, ConfigError, "no stage/2k.*65k, .*262k.*524k, .*1048k.*4194k"),
        (["+stage=65k", "model=llama2"], 1, ConfigError, "no model/llama2.*llama3-8b"),
        (["+stage=65k", "train.stepz=3"], 8, ConfigError, r"Did you mean train\.steps"),
        (["+stage=65k", "train.steps=many"], 8, ConfigError, r"train\.steps"),
        (["+stage=65k", "train.steps=0"], 8, ConfigError, r"train\.steps=0: must be at least 1"),
        (["+stage=65k", "precision=fp8"], 8, ConfigError, "precision='fp8': choose one of bf16, fp32"),
        (["+stage=1048k"], 1, LayoutError, r"wants 512 GPUs(.|\n)*here: 1 CPU process(.|\n)*\+scale=mini"),
        (["+stage=65k", "+scale=mini", "topology.tp=3"], 4, LayoutError, "3 ranks together, .* the 4 started"),
        (["+stage=65k", "+scale=mini", "topology.tp=8"], 8, LayoutError, "4 key-value heads|No layout"),
        (
            ["+stage=65k", "+scale=mini", "topology.tp=1", "topology.cp=1", "topology.pp=1", "topology.dp=2"],
            4,
            LayoutError,
            "takes 2 ranks, but 4 were started",
        ),
        (["+stage=65k", "+scale=mini", "stage.seq_length=66048", "topology.cp=4"], 4, LayoutError, r"258.*2\*cp"),
        (["+stage=1048k", "stage.theta=1e6"], 512, ThetaError, "contradicts .*2804339833"),
        (["+stage=1048k", "+scale=mini", "stage.theta=1e6"], 4, ThetaError, "contradicts"),
        (["+stage=65k", "stage.theta_law=fixed", "stage.theta=null"], 8, ThetaError, r"without stage\.theta"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(
    overrides: list[str], world_size: int, error: type[UserError], says: str
) -> None:
    with pytest.raises(error, match=says):
        run_of(overrides, world_size)
