"""Which algorithm runs on which process groups? One callable, whatever moves underneath.

| cp_comm_type | what moves | when |
|---|---|---|
| p2p        | keys and values, hop by hop; their gradients | any number of ranks and heads |
| a2a        | heads against sequence, twice | CP divides the key-value heads of a TP rank; the fewest bytes there |
| a2a+p2p    | heads inside, keys and values outside | fast wires inside a node, slow ones between |
| all_gather | all keys and values at once | short rings, few key-value heads, memory to spare |
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megalong.attention import gather, ring
from megalong.attention.exchange import Exchange, Ring
from megalong.attention.gather import GatheredAttention
from megalong.attention.heads import Groups, HeadAttention
from megalong.attention.kept import Kept
from megalong.attention.kernel import Kernel
from megalong.attention.ring import RingAttention
from megalong.attention.tiles import Documents


class Algorithm:
    """Differentiable causal attention over the local shards of a context-parallel group.

    Args:
        cp_comm_type: p2p, a2a, a2a+p2p or all_gather.
        group: the context-parallel group; None: this rank alone, whatever the algorithm.
        hierarchy: for a2a+p2p, (group that trades heads, group of the ring), as megatron-core's hierarchical
            context-parallel groups: the first holds consecutive ranks of `group`.
    """

    def __init__(
        self,
        cp_comm_type: str,
        group: dist.ProcessGroup | None,
        hierarchy: Sequence[dist.ProcessGroup] | None = None,
    ) -> None:
        self.cp_comm_type = cp_comm_type
        self.group = group
        self.size = group.size() if group is not None else 1
        if self.size == 1:
            self.cp_comm_type = "p2p"  # a ring of one: nothing moves
        if self.cp_comm_type == "a2a+p2p":
            assert hierarchy is not None, "a2a+p2p needs megatron's hierarchical context-parallel groups"
            assert len(hierarchy) == 2, hierarchy
            self._heads = Groups(Exchange(hierarchy[0]), Ring(hierarchy[1]))
        elif self.cp_comm_type == "a2a":
            self._heads = Groups(Exchange(group), Ring(None))
        elif self.cp_comm_type == "all_gather":
            self._exchange = Exchange(group)
        else:
            assert self.cp_comm_type == "p2p", cp_comm_type
            self._ring = Ring(group)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        documents: Documents,
        kernel: Kernel,
        wire_dtype: torch.dtype,
        kept: Kept | None = None,
    ) -> torch.Tensor:
        """Attend: q [S, B, H, D], k and v [S, B, K, D], all local and in zigzag order, to out [S, B, H, D].

        Args:
            documents: global starts of the documents, or None.
            wire_dtype: dtype in which dk and dv travel a ring or are reduce-scattered.
            kept: of a layer that is computed twice.
        """
        length = q.shape[0] * self.size
        if self.cp_comm_type == "p2p":
            place = self._ring
            return RingAttention.apply(
                q, k, v, place, ring.plan(length, place.size, place.rank, documents), kernel, wire_dtype, kept
            )
        if self.cp_comm_type == "all_gather":
            group = self._exchange
            return GatheredAttention.apply(
                q, k, v, group, gather.plan(length, group.size, group.rank, documents), kernel, wire_dtype, kept
            )
        outer = self._heads.outer
        return HeadAttention.apply(
            q, k, v, self._heads, ring.plan(length, outer.size, outer.rank, documents), kernel, wire_dtype, kept
        )
