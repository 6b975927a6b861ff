"""How many bytes does each algorithm move, and how much memory does it hold? Closed formulas, no torch.

For one layer and one rank, in payload bytes sent (as many are received; ranks are alike). S is the local tokens,
B the batch, H and K the query and key-value heads of a tensor-parallel rank, D the head dim, n = CP, a the ranks that
trade heads and r = n/a those of the ring outside, e the bytes of the model's dtype, w those in which dK and dV travel,
block = 2*S*B*K*D the elements of one block of keys and values:

| cp_comm_type | forward | backward |
|---|---|---|
| p2p        | (n-1) * block * e                            | (n-1) * block * (e + w) |
| a2a        | (n-1)/n * 2*S*B*(H+K)*D * e                  | the same |
| a2a+p2p    | (a-1)/a * 2*S*B*(H+K)*D * e + (r-1) * block * e | the same a2a + (r-1) * block * (e + w) |
| all_gather | (n-1) * block * e                            | (n-1) * block * (e + w) |

Recompute runs the forward once more and doubles its row, unless it keeps attention (`kept.py`): then only the a2a is
done again. A test counts the bytes and compares them with these.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one attention layer."""

    tokens: int
    """S: tokens of the sequence on this context-parallel rank."""
    heads: int
    """H: query heads of a tensor-parallel rank."""
    kv_heads: int
    """K: key-value heads of a tensor-parallel rank."""
    head_dim: int
    batch: int = 1
    element_bytes: int = 2
    """e: bytes of one element of q, k, v."""
    wire_bytes: int = 4
    """w: bytes of one element of dK and dV on the wire."""

    @property
    def block(self) -> int:
        """Elements of one block of keys and values."""
        return 2 * self.tokens * self.batch * self.kv_heads * self.head_dim

    @property
    def rows(self) -> int:
        """Elements of the queries (or outputs)."""
        return self.tokens * self.batch * self.heads * self.head_dim


Bytes = dict[str, int]
"""Payload bytes sent by one rank, by kind of collective as `meters` names them."""


def forward_bytes(cp_comm_type: str, shard: Shard, cp: int, inner: int | None = None) -> Bytes:
    """Bytes of one forward pass.

    Args:
        inner: ranks that trade heads, for a2a+p2p.
    """
    hop = shard.block * shard.element_bytes
    return _by_kind(cp_comm_type, shard, cp, inner, ring={"ring_kv": hop}, gather={"all_gather": hop})


def backward_bytes(cp_comm_type: str, shard: Shard, cp: int, inner: int | None = None) -> Bytes:
    """Bytes of one backward pass (without a recomputed forward)."""
    hop, home = shard.block * shard.element_bytes, shard.block * shard.wire_bytes
    return _by_kind(
        cp_comm_type,
        shard,
        cp,
        inner,
        ring={"ring_kv": hop, "ring_dkv": home},
        gather={"all_gather": hop, "reduce_scatter": home},
    )


def _by_kind(cp_comm_type: str, shard: Shard, cp: int, inner: int | None, ring: Bytes, gather: Bytes) -> Bytes:
    if cp_comm_type == "all_gather":
        found = {kind: (cp - 1) * size for kind, size in gather.items()}
    else:
        a = {"p2p": 1, "a2a": cp, "a2a+p2p": inner}[cp_comm_type]
        assert a is not None, "a2a+p2p needs inner"
        assert cp % a == 0, (cp, a)
        heads = (2 * shard.rows + shard.block) * shard.element_bytes
        found = {"a2a": heads // a * (a - 1)}
        # after the exchange a rank has a times the tokens and 1/a of the heads: the block keeps its size
        found |= {kind: (cp // a - 1) * size for kind, size in ring.items()}
    return {kind: size for kind, size in found.items() if size}
