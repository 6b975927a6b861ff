"""What the plan foretold beside what a run does, and the counter of the bytes that collectives really move.

Every collective of torch.distributed passes the dispatcher as an operator of the `c10d` namespace, whoever calls it:
megatron-core, its optimizer, our attention. Counting there misses nothing and needs no change anywhere. It costs some
microseconds per operator, so it is used for single steps.

Bytes are what one rank sends when collectives run as rings, which is what bandwidth-optimal libraries do:
all-gather and reduce-scatter (n-1)/n of the whole, all-reduce twice that, point to point and broadcast the message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.planning.plan import Plan
from megalong.planning.traffic import Key, step_bytes
from megalong.runtime import device
from megalong.topology.layout import ORDER, Layout
from megalong.training.agreement import Agreement
from megalong.training.steps import Done


def _bytes(x: Any) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    return sum(_bytes(y) for y in x) if isinstance(x, (list, tuple)) else 0


def _whole(x: Any, n: int) -> int:
    return _bytes(x) * (n - 1) // n


# c10d operator -> (kind, bytes sent by this rank given (arguments, group size)); torch/csrc/distributed/c10d/Ops.cpp
_OPERATORS: dict[str, tuple[str, Callable[[tuple[Any, ...], int], int]]] = {
    "allreduce_": ("all_reduce", lambda a, n: 2 * _whole(a[0], n)),
    "_allgather_base_": ("all_gather", lambda a, n: _whole(a[0], n)),
    "allgather_": ("all_gather", lambda a, n: _whole(a[0], n)),
    "allgather_into_tensor_coalesced_": ("all_gather", lambda a, n: _whole(a[0], n)),
    "_reduce_scatter_base_": ("reduce_scatter", lambda a, n: _whole(a[1], n)),
    "reduce_scatter_": ("reduce_scatter", lambda a, n: _whole(a[1], n)),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda a, n: _whole(a[1], n)),
    "alltoall_base_": ("all_to_all", lambda a, n: _whole(a[1], n)),
    "alltoall_": ("all_to_all", lambda a, n: _whole(a[1], n)),
    "broadcast_": ("broadcast", lambda a, n: _bytes(a[0])),
    "send": ("send", lambda a, n: _bytes(a[0])),
}


class TrafficCounter(TorchDispatchMode):
    """Counts collectives inside a `with` block, by group and kind.

    Args:
        layout: names the groups: by the axes along which their members differ.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.sent: dict[Key, int] = defaultdict(int)
        """Bytes this rank sent."""
        self.calls: dict[Key, int] = defaultdict(int)
        self._layout = layout

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, func: Any, args: tuple[Any, ...]) -> None:
        if name not in _OPERATORS:
            assert name in ("barrier", "recv_", "monitored_barrier_"), f"collective {name} is not counted"
            return
        where = [a.name for a in func._schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(args[where])
        kind, sent = _OPERATORS[name]
        ranks = tuple(dist.get_process_group_ranks(group))
        if len(ranks) > 1:
            key = (self._name(ranks), kind)
            self.sent[key] += sent(args, len(ranks))
            self.calls[key] += 1

    def _name(self, ranks: tuple[int, ...]) -> str:
        """The axes along which the members of a group differ."""
        members = [self._layout.coordinates(r) for r in ranks]
        return "+".join(a for a in ORDER if len({getattr(m, a) for m in members}) > 1)


class Beside:
    """Holds a plan against what a rank sees (a `Watcher`).

    Args:
        plan: of this run.
        rank: this process.
    """

    prefix = "plan"

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

    def look(self, done: Done, word: Agreement) -> dict[str, float]:
        """The step beside what was planned."""
        return self.scalars(done.seconds, device.peak_memory_bytes(), done.window)

    def scalars(self, seconds: float, peak_memory_bytes: int, window: int | None = None) -> dict[str, float]:
        """Scalars of one step, in pairs `<what>_predicted` and `<what>_actual`; memory and bytes in MiB.

        Args:
            window: tokens of the sequences that it read; None: the run's window.
        """
        found = {
            "step_seconds_predicted": self.plan.step_s_of(window or self.plan.work.seq_length),
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
