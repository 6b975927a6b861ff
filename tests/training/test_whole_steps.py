"""Whole steps of the real trainer are those of transformers and torch's AdamW, in every layout, and so is the loss by
position before and after them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.runtime import device
from megalong.runtime.ranks import RankPool
from tests.training.whole_steps import (
    BASE_THETA,
    CLIP,
    PEAK,
    Reference,
    Steps,
    make_base,
    make_data,
    rates_of,
    stage_theta,
    start_of,
    trained,
)
from tests.variants import long_but

Kind = tuple[str, str]
FP32, FP32_INTRA = ("fp32", "none"), ("fp32", "intra")
BF16, BF16_INTRA = ("bf16", "none"), ("bf16", "intra")
CASES: dict[tuple[int, int, int, int], list[Kind]] = {
    # tp, cp, pp, dp
    (1, 1, 1, 1): [FP32, FP32_INTRA, BF16, BF16_INTRA],
    (2, 1, 1, 1): [FP32, BF16_INTRA],
    (1, 4, 1, 1): [FP32, FP32_INTRA, BF16_INTRA],
    (1, 2, 1, 2): [FP32_INTRA, BF16],
    (2, 1, 2, 1): [FP32, FP32_INTRA, BF16],
    (2, 2, 1, 2): [FP32_INTRA],
}
# loss and gradient norm, relative; loss by position, nats; change of each parameter, relative L2 distance. fp32 is what
# another order of summation leaves (found: 1e-7, 2e-7, 1e-6, 5e-6); bf16 what its eight bits do to activations and
# gradients (found: 8e-5, 1e-3, 4e-3, 2e-2)
TOLERANCES = {"fp32": (1e-6, 2e-6, 1e-5, 5e-5), "bf16": (4e-4, 4e-3, 2e-2, 5e-2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("whole-steps")
    make_base(where / "base")
    make_data(where / "data")
    return where


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[Kind], Steps]:
    return cache(lambda kind: Reference(folder, *kind).run())


@pytest.mark.parametrize(
    "layout", long_but(CASES, (1, 2, 1, 2), (2, 1, 2, 1)), ids=lambda x: "tp{} cp{} pp{} dp{}".format(*x)
)
def test_losses_norms_rates_weights_and_evaluation_are_those_of_transformers_and_adamw(
    ranks: RankPool, folder: Path, expected: Callable[[Kind], Steps], layout: tuple[int, int, int, int]
) -> None:
    tp, cp, pp, dp = layout
    sizes = [f"topology.tp={tp}", f"topology.cp={cp}", f"topology.pp={pp}", f"topology.dp={dp}"]
    found = ranks.run(trained, tp * cp * pp * dp, str(folder), f"run{tp}{cp}{pp}{dp}", CASES[layout], sizes)[0]
    start = start_of(folder)
    for kind, steps in found.items():
        same_steps(steps, expected(kind), start, *TOLERANCES[kind[0]])


def trained_deterministically(*how: Any) -> dict[Kind, Steps]:
    device.be_deterministic()
    try:
        return trained(*how)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_deterministic_run_uses_no_operator_that_torch_refuses(
    ranks: RankPool, folder: Path, expected: Callable[[Kind], Steps]
) -> None:
    sizes = ["topology.tp=2", "topology.cp=2", "train.deterministic=true"]
    found = ranks.run(trained_deterministically, 4, str(folder), "deterministic", [BF16_INTRA], sizes)[0]
    same_steps(found[BF16_INTRA], expected(BF16_INTRA), start_of(folder), *TOLERANCES["bf16"])


def same_steps(
    found: Steps, expected: Steps, start: dict[str, torch.Tensor], loss: float, norm: float, nats: float, change: float
) -> None:
    assert len(found.metrics) == len(expected.metrics)
    for line, right in zip(found.metrics, expected.metrics, strict=True):
        assert line["loss"] == pytest.approx(right["loss"], rel=loss)
        assert line["grad_norm"] == pytest.approx(right["grad_norm"], rel=norm)
        assert line["lr"] == pytest.approx(right["lr"], rel=1e-12)
        assert (line["tokens"], line["valid_tokens"]) == (right["tokens"], right["valid_tokens"])
    for when, by_position in expected.evaluation.items():
        assert found.evaluation[when] == pytest.approx(by_position, abs=nats), when
    assert found.weights.keys() == start.keys()
    for name, before in start.items():
        distance = (found.weights[name] - expected.weights[name]).norm() / (expected.weights[name] - before).norm()
        assert float(distance) <= change, (name, float(distance))


DECAYS = {
    # settings of the run, and of torch's or transformers' schedule; steps of a whole cosine, five of six of the others
    "linear": ({"min_lr": 1e-3}, (1, 1, 1, 1)),
    "cosine": ({}, (2, 1, 1, 1)),
    "wsd": ({"wsd_steps": 3, "wsd_shape": "minus_sqrt", "min_lr": 5e-4}, (1, 2, 1, 2)),
}


@pytest.mark.parametrize("decay", DECAYS)
def test_steps_at_a_decaying_rate_are_those_of_adamw_under_torchs_and_transformers_schedules(
    ranks: RankPool, folder: Path, decay: str
) -> None:
    settings, (tp, cp, pp, dp) = DECAYS[decay]
    rates = rates_of(decay, 6, **settings)
    sizes = [f"topology.tp={tp}", f"topology.cp={cp}", f"topology.pp={pp}", f"topology.dp={dp}"]
    given = [f"optimizer.{name}={value}" for name, value in {"decay": decay, **settings}.items()]
    found = ranks.run(trained, tp * cp * pp * dp, str(folder), decay, [FP32], [*sizes, *given, "train.steps=6"])[0]
    same_steps(found[FP32], Reference(folder, *FP32, rates).run(), start_of(folder), *TOLERANCES["fp32"])


def test_what_is_compared_could_tell_the_difference(expected: Callable[[Kind], Steps]) -> None:
    """Stage and base differ in theta, clipping binds in some steps and not in others, the warm-up ends on the way."""
    assert stage_theta() > 10 * BASE_THETA
    steps = expected(FP32)
    norms, rates = ([line[key] for line in steps.metrics] for key in ("grad_norm", "lr"))
    assert min(norms) < CLIP < max(norms)
    assert rates[0] < rates[1] < rates[2] == PEAK
    by_position = steps.evaluation["before"]
    assert min(abs(a - b) for a, b in zip(by_position, reversed(by_position), strict=True)) > 1e-3
