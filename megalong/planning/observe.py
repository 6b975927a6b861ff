"""How many bytes does each collective of a step really move, and over which group? Counted, to hold against the plan.

Every collective of torch.distributed passes the dispatcher as an operator of the `c10d` namespace, whoever calls it:
megatron-core, its optimizer, our attention. Counting there misses nothing and needs no change anywhere. It costs some
microseconds per operator, so it is used for single steps.

Bytes are what one rank sends when collectives run as rings, which is what bandwidth-optimal libraries do:
all-gather and reduce-scatter (n-1)/n of the whole, all-reduce twice that, point to point and broadcast the message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.topology.layout import ORDER, Layout

Key = tuple[str, str]
"""(axes of the group joined by "+", kind of collective)."""


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
