"""How well did the plan foretell this run? Predicted beside actual, for TensorBoard and for the console."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megalong.planning.communication import step_bytes
from megalong.planning.observe import TrafficCounter
from megalong.planning.plan import Plan


class Beside:
    """Holds a plan against what a rank sees.

    Args:
        plan: of this run.
        rank: this process.
    """

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan = plan
        self.expected = step_bytes(plan.work, plan.work.layout.coordinates(rank).pp)
        self._counter: TrafficCounter | None = None

    def counting(self) -> AbstractContextManager[Any]:
        """A context in which the first step is run: its bytes are counted. Later contexts count nothing."""
        if self._counter is not None:
            return nullcontext()
        self._counter = TrafficCounter(self.plan.work.layout)
        return self._counter

    def scalars(self, seconds: float, peak_memory_bytes: int) -> dict[str, float]:
        """Scalars of one step, in pairs `<what>_predicted` and `<what>_actual`; memory and bytes in MiB."""
        found = {
            "step_seconds_predicted": self.plan.step_s,
            "step_seconds_actual": seconds,
            "memory_MiB_predicted": self.plan.memory.total / 2**20,
            "memory_MiB_actual": peak_memory_bytes / 2**20,
        }
        if self._counter is not None:
            found["sent_MiB_per_step_predicted"] = sum(self.expected.values()) / 2**20
            found["sent_MiB_per_step_actual"] = sum(self._counter.sent.values()) / 2**20
        return found

    def differences(self) -> dict[str, tuple[int, int]]:
        """Collectives of the counted step whose bytes were not as predicted: name to (predicted, counted)."""
        seen = self._counter.sent if self._counter is not None else self.expected
        return {
            "/".join(key): (self.expected.get(key, 0), seen.get(key, 0))
            for key in sorted({*self.expected, *seen})
            if self.expected.get(key, 0) != seen.get(key, 0)
        }

    def summary(self) -> str:
        """One line about the plan, for the start of a run."""
        plan = self.plan
        return (
            f"planned: {plan.step_s:.3g} s a step, {plan.memory.total / 2**30:.2f} of "
            f"{plan.memory.capacity / 2**30:.1f} GiB, {sum(self.expected.values()) / 2**20:,.1f} MiB sent per step and "
            f"rank ({plan.cluster.name})"
        )
