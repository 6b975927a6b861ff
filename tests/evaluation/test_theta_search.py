"""The search finds the lowest loss within its budget, and repeats nothing that was finished."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import pytest

from megalong.evaluation.theta_search import (
    Budget,
    Scores,
    Search,
    Trial,
    candidates,
    parabola,
    plan_schedule,
    trial_from,
)
from megalong.rope.bound import lower_bound
from megalong.rope.theta import RotaryPoint, scaling_law
from megalong.runtime.errors import ConfigError

BASE = RotaryPoint(10_000, 32)
BUDGET = Budget(tokens=2_000_000, step=4096, look=2048, questions=4096)
BEST = 3e6


def loss(theta: float, steps: int, seed: int) -> float:
    return 3.0 + 0.05 * math.log(theta / BEST) ** 2 / (1 + steps) + 0.001 * math.sin(seed * theta)


class World:
    """Answers a search from a formula and counts."""

    def __init__(self, needle: float | None = None, dies_after: int | None = None) -> None:
        self.asked: list[tuple[float, int, int]] = []
        self.needle, self.dies_after = needle, dies_after

    def __call__(self, theta: float, steps: int, seed: int, needles: bool) -> Scores:
        if len(self.asked) == self.dies_after:
            raise KeyboardInterrupt
        self.asked.append((theta, steps, seed))
        return Scores(loss(theta, steps, seed), 2.5, self.needle if needles else None)


def search(world: World, trials: list[Trial], kept: list[Trial], budget: Budget = BUDGET):
    thetas = candidates(BASE, BASE, 1024, 32, 4.0, 7)
    schedule = plan_schedule(len(thetas), 3, budget)
    return Search(world, budget, 1, trials, kept.append).run(thetas, schedule, 1024, thetas[0], 2.5)


def test_candidates_lie_between_the_bound_and_four_times_the_scaling_law():
    thetas = candidates(BASE, BASE, 1024, 32, 4.0, 7)
    assert thetas == sorted(thetas)
    assert thetas[0] == pytest.approx(lower_bound(1024, 32))
    assert thetas[-1] == pytest.approx(4 * scaling_law(BASE, 1024), rel=1e-6)
    assert scaling_law(BASE, 1024) in thetas
    assert all(math.log(b / a) >= 0.01 for a, b in pairwise(thetas))


def test_the_pick_is_the_lowest_loss_and_the_differences_are_paired():
    found = search(World(), [], [])
    assert abs(math.log(found.theta / BEST)) < 0.7
    assert found.standings[0].difference == found.standings[0].spread == 0.0
    assert all(s.difference >= 0 for s in found.standings)
    assert any(s.spread > 0 for s in found.standings[1:])
    assert found.standings[0].needle is None


def test_a_search_ends_within_its_budget_and_uses_most_of_it():
    for tokens in (900_000, 2_000_000, 7_000_000):
        budget = Budget(tokens, BUDGET.step, BUDGET.look, BUDGET.questions)
        found = search(World(0.5), [], [], budget)
        assert 0.5 * tokens < found.tokens <= tokens
        assert found.tokens == sum(t.tokens for t in found.trials)


def test_a_budget_too_small_to_decide_is_refused_with_what_it_needs():
    with pytest.raises(ConfigError, match=r"budget of 10,000 tokens is too small .* at least ([\d,]+)") as refusal:
        plan_schedule(9, 3, Budget(10_000, BUDGET.step, BUDGET.look, BUDGET.questions))
    need = int(str(refusal.value).split("at least ")[1].split(" ")[0].replace(",", ""))
    plan_schedule(9, 3, Budget(need, BUDGET.step, BUDGET.look, BUDGET.questions))
    with pytest.raises(ConfigError):
        plan_schedule(9, 3, Budget(need - 1, BUDGET.step, BUDGET.look, BUDGET.questions))


@pytest.mark.parametrize("dies_after", [0, 3, 11, 20])
def test_a_search_that_was_killed_repeats_nothing_and_ends_the_same(dies_after):
    whole = search(World(0.3), [], [])
    kept: list[Trial] = []
    first = World(0.3, dies_after)
    with pytest.raises(KeyboardInterrupt):
        search(first, [], kept)
    written = [trial_from(json.loads(json.dumps(asdict(t)))) for t in kept]
    assert written == kept
    second = World(0.3)
    again = search(second, written, [])
    assert again == whole
    assert not set(first.asked) & set(second.asked)


def test_needles_come_before_the_loss_where_they_differ():
    class Sees(World):
        def __call__(self, theta: float, steps: int, seed: int, needles: bool) -> Scores:
            scores = super().__call__(theta, steps, seed, needles)
            return Scores(scores.last_quarter, 2.5, (0.1 if theta == by_loss else 0.9) if needles else None)

    by_loss = search(World(), [], []).theta
    found = search(Sees(), [], [])
    assert found.theta != by_loss
    assert [s.needle for s in found.standings] == sorted((s.needle for s in found.standings), reverse=True)


def test_harm_at_short_context_is_paid_for():
    class Harmed(World):
        def __call__(self, theta: float, steps: int, seed: int, needles: bool) -> Scores:
            scores = super().__call__(theta, steps, seed, needles)
            return Scores(scores.last_quarter, 2.5 + max(0.0, math.log(theta / 1e6)), None)

    assert search(Harmed(), [], []).theta < search(World(), [], []).theta


def test_the_parabola_finds_the_lowest_point_between_its_neighbours():
    thetas = [1e5, 1e6, 1e7, 1e8]
    assert parabola({t: (math.log(t) - math.log(2e6)) ** 2 for t in thetas}) == pytest.approx(2e6, rel=1e-5)
    assert parabola({t: -((math.log(t) - 14) ** 2) for t in thetas}) is None
    assert parabola({t: math.log(t) for t in thetas}) is None
    assert parabola({1e5: 1.0, 1e6: 2.0}) is None
