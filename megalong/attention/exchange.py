"""How do tensors move between context-parallel ranks while this one computes? Each collective is started, then awaited.

On CUDA, NCCL runs on its own stream: a collective started before a kernel is queued runs beside that kernel, and
`wait` makes only the compute stream wait. On the CPU, gloo's thread moves the bytes. A ring exchange is one batch of
sends to the right and receives from the left, issued by all ranks alike, so no order of ranks can deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalong.attention import meters

Move = tuple[str, torch.Tensor, torch.Tensor]
"""(kind of traffic, contiguous tensor to send, contiguous tensor to receive into)."""

Parts = Sequence[torch.Tensor]


def nbytes(x: torch.Tensor) -> int:
    """Payload bytes of a tensor."""
    return x.numel() * x.element_size()


class Pending:
    """Collectives under way. Tensors given to them belong to them until `wait` returns."""

    def __init__(self, works: Sequence[dist.Work], *keep: torch.Tensor) -> None:
        self._works = works
        self._keep = keep  # alive until the transfer is over

    def wait(self) -> None:
        """Return when the received tensors may be read and the sent ones overwritten (by the compute stream)."""
        if self._works:
            meters.timed(self._finish)
        self._works, self._keep = (), ()

    def _finish(self) -> None:
        for work in self._works:
            work.wait()


class Ring:
    """One rank's place in a ring: it sends to its right neighbour and receives from its left one.

    Args:
        group: the ranks of the ring in ring order; None: this rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = group.size() if group is not None else 1
        self.rank = group.rank() if group is not None else 0
        if self.size > 1:
            assert group is not None
            self.right = dist.get_global_rank(group, (self.rank + 1) % self.size)
            self.left = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def shift(self, *moves: Move) -> Pending:
        """Start one hop of every move: all of them in one batch."""
        ops = []
        for kind, send, receive in moves:
            ops.append(dist.P2POp(dist.isend, send, self.right, self.group))
            ops.append(dist.P2POp(dist.irecv, receive, self.left, self.group))
            meters.count(kind, nbytes(send), nbytes(receive))
        return Pending(dist.batch_isend_irecv(ops) if ops else (), *(t for m in moves for t in m[1:]))


class Exchange:
    """Collectives among the ranks of one group, each started at once and awaited later.

    Args:
        group: None: this rank alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.size = group.size() if group is not None else 1
        self.rank = group.rank() if group is not None else 0

    def all_to_all(self, kind: str, send: Sequence[Parts], receive: Sequence[Parts]) -> Pending:
        """Start sending the tensors `send[j]` to rank j and receiving into `receive[j]` from rank j.

        As a batch of point-to-point transfers (what NCCL's all-to-all is), so that parts arrive where they are
        used instead of in a buffer that would have to be reordered.
        """
        for mine, there in zip(send[self.rank], receive[self.rank], strict=True):
            there.copy_(mine)
        ops: list[dist.P2POp] = []
        keep: list[torch.Tensor] = []
        for away in range(1, self.size):
            to, source = (self.rank + away) % self.size, (self.rank - away) % self.size
            ops += [dist.P2POp(dist.isend, x, self._global(to), self.group) for x in send[to]]
            ops += [dist.P2POp(dist.irecv, x, self._global(source), self.group) for x in receive[source]]
            keep += [*send[to], *receive[source]]
            meters.count(kind, sum(map(nbytes, send[to])), sum(map(nbytes, receive[source])))
        return Pending(dist.batch_isend_irecv(ops) if ops else (), *keep)

    def all_gather(self, parts: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Pending]:
        """Start gathering each [S, ...] part into [size*S, ...], in rank order."""
        whole = [x.new_empty(self.size * x.shape[0], *x.shape[1:]) for x in parts]
        works = []
        for full, x in zip(whole, parts, strict=True):
            works.append(dist.all_gather_into_tensor(full, x, group=self.group, async_op=True))
            meters.count("all_gather", nbytes(full) - nbytes(x), nbytes(full) - nbytes(x))
        return whole, Pending(works, *parts, *whole)

    def reduce_scatter(self, whole: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Pending]:
        """Start summing each [size*S, ...] over the ranks; this rank gets its [S, ...] part of the sum."""
        parts = [x.new_empty(x.shape[0] // self.size, *x.shape[1:]) for x in whole]
        works = []
        for x, full in zip(parts, whole, strict=True):
            works.append(dist.reduce_scatter_tensor(x, full, group=self.group, async_op=True))
            meters.count("reduce_scatter", nbytes(full) - nbytes(x), nbytes(full) - nbytes(x))
        return parts, Pending(works, *parts, *whole)

    def _global(self, rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)
