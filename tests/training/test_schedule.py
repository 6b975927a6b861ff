"""The learning rate of a step: a function of the step alone, that of torch's and transformers' schedules."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.recipe.compose import compose
from megalong.recipe.resolve import resolve, run_of
from megalong.run import Run
from megalong.runtime.errors import ConfigError
from megalong.runtime.ranks import RankPool
from megalong.training.schedule import scheduler, set_rates
from tests.training.runs import metrics, outcome_of, run_stage
from tests.training.whole_steps import rates_of

SAID = compose(["+stage=65k", "+scale=mini"], 1)


def settings(*overrides: str) -> Run:
    return run_of(["+stage=65k", "+scale=mini", *overrides], 1)


def run_with(peak: float, steps: int, **optimizer: Any) -> Run:
    """The run of a thousand examples: without the command line, which takes most of the time."""
    train = replace(SAID.train, lr=peak, steps=steps)
    return resolve(replace(SAID, train=train, optimizer=replace(SAID.optimizer, **optimizer)), 1)


def rates(run: Run, steps: int) -> list[float]:
    """What a fresh scheduler says of each step, last one first: nothing is left from the step asked for before."""
    schedule = scheduler(run, torch.optim.SGD([torch.zeros(1)]))
    return [set_rates(schedule, step) for step in reversed(range(steps))][::-1]


@given(
    peak=st.floats(1e-7, 1.0),
    warmup=st.integers(0, 200),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
    after=st.integers(1, 100),
    low=st.floats(0, 1),
)
def test_every_step_has_the_rate_of_torchs_schedules(
    peak: float, warmup: int, decay: str, after: int, low: float
) -> None:
    steps = warmup + after
    low = 0.0 if decay == "constant" else low * peak
    found = rates(run_with(peak, steps, warmup_steps=warmup, decay=decay, min_lr=low), steps)
    expected = rates_of(decay, steps, peak=peak, warmup=warmup, min_lr=low)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12 * peak)
    assert found[warmup] == peak
    assert min(found) > 0


@pytest.mark.parametrize("shape", ["linear", "cosine", "minus_sqrt"])
def test_wsd_decays_as_transformers_does_in_its_last_steps_alone(shape: str) -> None:
    run = run_with(1e-3, 40, warmup_steps=5, decay="wsd", min_lr=1e-4, wsd_steps=10, wsd_shape=shape)
    found = rates(run, 40)
    expected = rates_of("wsd", 40, peak=1e-3, warmup=5, min_lr=1e-4, wsd_steps=10, wsd_shape=shape)
    assert found == pytest.approx(expected, rel=1e-12)
    assert set(found[5:31]) == {1e-3}
    assert found[30] > found[31] > found[39] > 1e-4


def test_exponential_wsd_falls_by_halves() -> None:
    run = run_with(1e-3, 20, decay="wsd", wsd_steps=10, wsd_shape="exponential")
    assert rates(run, 20)[10:] == pytest.approx([1e-3 * (2 * 0.5 ** (t / 10) - 1) for t in range(10)], rel=1e-12)


@given(peak=st.floats(1e-7, 1.0), warmup=st.integers(0, 400), step=st.integers(0, 500))
def test_without_a_decay_every_bit_is_that_of_the_runs_before_there_was_one(
    peak: float, warmup: int, step: int
) -> None:
    run = run_with(peak, 30, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)])
    found = set_rates(scheduler(run, optimizer), step)
    assert found == (peak if step >= warmup else peak * (step + 1) / (warmup + 1))
    assert optimizer.param_groups[0]["lr"] == found


def test_after_the_decay_the_rate_stays() -> None:
    assert rates(run_with(1e-3, 9, decay="linear", decay_steps=4), 9) == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 0, 0, 0, 0], abs=1e-18
    )


def test_lengths_that_follow_from_the_stage_stand_in_the_completed_configuration() -> None:
    def lengths(*overrides: str) -> tuple[Any, ...]:
        optimizer = settings(*overrides).config.optimizer
        return optimizer.decay_steps, optimizer.wsd_steps

    assert lengths() == (None, None)  # as in every config.yaml that was written before there was a decay
    assert lengths("optimizer.decay=cosine", "train.steps=50") == (50, None)
    assert lengths("optimizer.decay=wsd", "train.steps=50") == (50, 5)
    assert lengths("optimizer.decay=wsd", "train.steps=3", "optimizer.warmup_steps=2") == (3, 1)


MISTAKES = {
    "optimizer.min_lr=1e-5": "optimizer.min_lr=1e-05 has no effect with optimizer.decay=constant",
    "optimizer.decay=cosine optimizer.wsd_steps=2": "wsd_steps=2 has no effect with optimizer.decay=cosine.*choose wsd",
    "optimizer.decay=linear optimizer.min_lr=1e-3": "min_lr=0.001: .*cannot end above train.lr=0.0005",
    "optimizer.decay=linear optimizer.warmup_steps=6": "warmup_steps=6 do not fit into optimizer.decay_steps=6",
    "optimizer.decay=wsd optimizer.warmup_steps=3 optimizer.wsd_steps=4": "warmup_steps=3 and optimizer.wsd_steps=4 do",
    "optimizer.decay=polynomial": "choose one of constant, linear, cosine, wsd",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_schedule_that_is_none_is_refused_with_the_values_that_met(overrides: str) -> None:
    with pytest.raises(ConfigError, match=MISTAKES[overrides]):
        settings("train.steps=6", *overrides.split())


def test_a_stopped_run_goes_on_at_the_rate_of_the_unbroken_one_and_another_decay_is_another_run(
    ranks: RankPool, tmp_path: Path
) -> None:
    given = ["optimizer.decay=cosine", "optimizer.warmup_steps=1", "train.steps=4"]
    given += ["train.global_batch_size=2", "model.vocab_size=512"]
    ranks.run(run_stage, 2, str(tmp_path / "a"), *given, "topology.dp=2")
    ranks.run(run_stage, 2, str(tmp_path / "b"), *given, "topology.dp=2", "train.stop_after=2")
    told = ranks.run(outcome_of, 1, str(tmp_path / "b"), *given, "topology.dp=1", "optimizer.decay=linear")
    assert "optimizer.decay cosine -> linear" in told[0]
    ranks.run(run_stage, 1, str(tmp_path / "b"), *given, "topology.dp=1")
    one, other = ([line["lr"] for line in metrics(tmp_path / name)] for name in "ab")
    assert one == other
    assert one[1] == max(one) > one[2] > one[3] > 0
