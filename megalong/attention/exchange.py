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
