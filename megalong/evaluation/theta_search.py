"""The theta that a window wants, by measurement: screening without training, halving, finalists, a parabola.

1. Candidates on ln(theta) between the lower bound of Men et al. and four times the scaling law, and the laws.
2. The starting weights under each theta, without training: loss on the last quarter of the window; the worse half goes.
3. Rounds of short runs, the same seed and data for all: the worse half goes, the next round is twice as long.
4. A parabola through the losses of the last round on ln(theta): its lowest point joins the finalists, if it is new.
5. Finalists train to the full length of the search with every seed. They are ranked by needle accuracy as far as it
   tells them apart, then by loss on the last quarter plus a penalty for harm at short context. Differences to the pick
   are paired by seed, with their spread.

The search itself trains nothing: whoever calls it measures. What has been measured is in a list that can be written
and read back, so that a search that was killed repeats nothing that was finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalong.rope.bound import lower_bound
from megalong.rope.theta import RotaryPoint, dynamic_ntk, scaling_law
from megalong.runtime.errors import ConfigError

FINALISTS = 3
SAME = 0.01  # candidates closer than this in ln(theta) are one


@dataclass(frozen=True)
class Scores:
    """What one model scored."""

    last_quarter: float
    """Nats per token on held-out text."""
    short: float
    """Nats per token within the base window."""
    needle: float | None = None
    """Share of needles found; None where no question could be asked."""
    curve: tuple[float | None, ...] = ()
    """Loss by position bucket."""


@dataclass(frozen=True)
class Trial:
    """One measurement."""

    theta: float
    steps: int
    """0: the starting weights."""
    seed: int
    tokens: int
    """Spent on it, training and measuring."""
    scores: Scores


@dataclass(frozen=True)
class Budget:
    """What a trial costs, and how many tokens there are."""

    tokens: int
    """For the whole search."""
    step: int
    """Tokens of one optimizer step."""
    look: int
    """Tokens of one measurement of losses."""
    questions: int
    """Tokens of one measurement of needles."""


@dataclass(frozen=True)
class Schedule:
    """How long the rounds are."""

    candidates: int
    rounds: tuple[tuple[int, int], ...]
    """(candidates, steps) of each round of short runs."""
    finalists: int
    """With the one of the parabola."""
    steps: int
    """Of a finalist."""
    seeds: int

    def cost(self, budget: Budget) -> int:
        """Tokens of all of it."""
        short = sum(n * (steps * budget.step + budget.look) for n, steps in self.rounds)
        final = self.finalists * self.seeds * (self.steps * budget.step + budget.look + budget.questions)
        return self.candidates * budget.look + short + final


@dataclass(frozen=True)
class Standing:
    """A finalist beside the pick."""

    theta: float
    needle: float | None
    last_quarter: float
    harm: float
    """Nats per token within the base window above the starting weights under their own theta."""
    objective: float
    difference: float
    """Objective minus the pick's, mean over seeds."""
    spread: float
    """Standard deviation of that difference over seeds; 0 with one seed."""


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    theta: float
    window: int
    bound: float
    schedule: Schedule
    standings: list[Standing]
    """Best first."""
    trials: list[Trial]
    tokens: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def candidates(
    base: RotaryPoint, before: RotaryPoint, window: int, head_dim: int, factor: float, count: int
) -> list[float]:
    """Thetas to look at, ascending: a grid on ln(theta) and the laws within it."""
    law = scaling_law(base, window)
    low, high = lower_bound(window, head_dim), 4 * law
    if low >= high:
        raise ConfigError(
            f"The lower bound for {window:,} tokens is {low:,.0f}, above four times the scaling law ({law:,.0f}): "
            "there is nothing to search between. Give stage.theta yourself."
        )
    grid = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    laws = [law, dynamic_ntk(before, window, head_dim, factor), dynamic_ntk(before, window, head_dim, 1.0)]
    found: list[float] = []
    for theta in sorted([*(float(round(t)) for t in grid), *(t for t in laws if low <= t <= high)]):
        if found and math.log(theta / found[-1]) < SAME:
            continue
        found.append(theta)
    return found


def plan_schedule(count: int, seeds: int, budget: Budget) -> Schedule:
    """The longest schedule that the budget pays.

    Raises:
        ConfigError: not even one step in the first round fits; the text says what that takes.
    """
    best: Schedule | None = None
    short = 1
    while True:
        schedule = _schedule(count, seeds, short)
        if schedule.cost(budget) > budget.tokens:
            break
        best, short = schedule, short + 1
    if best is None:
        need = _schedule(count, seeds, 1)
        raise ConfigError(
            f"A budget of {budget.tokens:,} tokens is too small to decide between {count} thetas with {seeds} seeds: "
            f"that takes at least {need.cost(budget):,} ({count} measurements, {len(need.rounds)} rounds of short "
            f"runs, {need.finalists} finalists of {need.steps} steps). Raise budget=, or lower candidates= and seeds=."
        )
    return best


def _schedule(count: int, seeds: int, short: int) -> Schedule:
    left, steps, rounds = math.ceil(count / 2), short, []
    while left > FINALISTS:
        rounds.append((left, steps))
        left, steps = max(FINALISTS, math.ceil(left / 2)), 2 * steps
    rounds.append((left, steps))
    return Schedule(count, tuple(rounds), min(left, FINALISTS) + 1, 2 * steps, seeds)


Measure = Callable[[float, int, int, bool], Scores]
"""(theta, steps, seed, whether to ask for needles) -> scores of the model."""


class Search:
    """A search that can be interrupted.

    Args:
        measure: trains (0 steps: not at all) and measures.
        trials: what an earlier attempt has measured.
        keep: called with every new trial.
        weight: of harm at short context, in nats of last-quarter loss per nat.
    """

    def __init__(
        self,
        measure: Measure,
        budget: Budget,
        seed: int,
        trials: Sequence[Trial] = (),
        keep: Callable[[Trial], None] = lambda trial: None,
        weight: float = 1.0,
    ) -> None:
        self._measure, self.budget, self.seed, self._keep, self.weight = measure, budget, seed, keep, weight
        self.trials = list(trials)

    def run(self, thetas: Sequence[float], schedule: Schedule, window: int, bound: float, base_short: float) -> Found:
        """Search; `base_short` is the short loss of the starting weights under their own theta."""
        left = list(thetas)
        looked = {t: self._trial(t, 0, self.seed, False).scores for t in left}
        left = sorted(left, key=lambda t: looked[t].last_quarter)[: schedule.rounds[0][0]]
        at_last: dict[float, float] = {}
        for i, (_, steps) in enumerate(schedule.rounds):
            at_last = {t: self._objective(self._trial(t, steps, self.seed, False).scores, base_short) for t in left}
            more = schedule.rounds[i + 1][0] if i + 1 < len(schedule.rounds) else schedule.finalists - 1
            left = sorted(left, key=lambda t: at_last[t])[:more]
        vertex = parabola(at_last)
        if vertex is not None and all(abs(math.log(vertex / t)) >= SAME for t in left):
            left.append(vertex)
        seeds = range(self.seed, self.seed + schedule.seeds)
        final = {t: [self._trial(t, schedule.steps, s, True).scores for s in seeds] for t in left}
        standings = self._rank(final, base_short)
        spent = sum(t.tokens for t in self.trials)
        return Found(standings[0].theta, window, bound, schedule, standings, list(self.trials), spent)

    def _trial(self, theta: float, steps: int, seed: int, needles: bool) -> Trial:
        for done in self.trials:
            if (done.theta, done.steps, done.seed) == (theta, steps, seed):
                return done
        scores = self._measure(theta, steps, seed, needles)
        tokens = steps * self.budget.step + self.budget.look + (self.budget.questions if needles else 0)
        trial = Trial(theta, steps, seed, tokens, scores)
        self.trials.append(trial)
        self._keep(trial)
        return trial

    def _objective(self, scores: Scores, base_short: float) -> float:
        return scores.last_quarter + self.weight * max(0.0, scores.short - base_short)

    def _rank(self, final: dict[float, list[Scores]], base_short: float) -> list[Standing]:
        objective = {t: [self._objective(s, base_short) for s in own] for t, own in final.items()}
        needle = {t: _mean([s.needle for s in own if s.needle is not None]) for t, own in final.items()}
        # needles decide where they differ by more than the seeds do
        noise = max((_spread([s.needle or 0.0 for s in own]) for own in final.values()), default=0.0)
        highest = max((n for n in needle.values() if n is not None), default=None)
        good = [t for t in final if highest is None or (needle[t] or 0.0) >= highest - noise]
        order = sorted(final, key=lambda t: (t not in good, _mean(objective[t]) or 0.0))
        pick = order[0]
        standings = []
        for t in order:
            differences = [a - b for a, b in zip(objective[t], objective[pick], strict=True)]
            standings.append(
                Standing(
                    theta=t,
                    needle=needle[t],
                    last_quarter=_mean([s.last_quarter for s in final[t]]) or 0.0,
                    harm=(_mean([s.short for s in final[t]]) or 0.0) - base_short,
                    objective=_mean(objective[t]) or 0.0,
                    difference=_mean(differences) or 0.0,
                    spread=_spread(differences),
                )
            )
        return standings


def parabola(losses: dict[float, float]) -> float | None:
    """The lowest point of the parabola on ln(theta) through the best theta and its neighbours; None where there is
    none between them."""
    thetas = sorted(losses)
    if len(thetas) < 3:
        return None
    best = min(range(len(thetas)), key=lambda i: losses[thetas[i]])
    middle = min(max(best, 1), len(thetas) - 2)
    three = thetas[middle - 1 : middle + 2]
    (x0, x1, x2), (y0, y1, y2) = [math.log(t) for t in three], [losses[t] for t in three]
    # Newton's divided differences
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (second - first) / (x2 - x0)
    if curvature <= 0:
        return None
    vertex = (x0 + x1) / 2 - first / (2 * curvature)
    return float(round(math.exp(vertex))) if x0 < vertex < x2 else None


def trial_from(raw: dict[str, Any]) -> Trial:
    """Inverse of `asdict`, from a line of trials.jsonl."""
    scores = dict(raw["scores"])
    return Trial(**{**raw, "scores": Scores(**{**scores, "curve": tuple(scores.get("curve", ()))})})


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
