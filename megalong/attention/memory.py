"""How much memory does attention hold? Closed bounds for what is saved and for the peaks, no torch.

Letters as in `traffic.py`; R = S*B*H*D elements of the queries, acc = 4 bytes of an accumulator (8 for fp64). Beyond
its inputs, p2p holds at most

    forward   2*block*e  +  R*(acc + e)  (+ R*acc where e < acc)
              two blocks of keys and values, the running output, one partial output (and its fp32 copy)
    backward  2*block*(e + w)  +  R*(acc + e)  +  1.5*block*e  (+ R*acc where e < acc)
              two blocks of keys and values, two of travelling dK and dV, dQ, one kernel's gradients, the held half
              (and, on the CPU, the fp32 copy of the kernel's dQ that PyTorch makes to add it)

plus log-sum-exp and the kernel's own workspace: none of it depends on the length of the whole sequence, only on the
local one. The other algorithms pay more: a2a a copy of everything in the other sharding, all_gather n blocks and
backward their fp32 gradients (gloo holds a copy of what it gathers besides). A test measures all at 64k tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from megalong.attention.traffic import Shard


class Peak(NamedTuple):
    """Bytes held at the worst moment beyond the inputs (q, k, v; backward also out, lse, dout), outputs included."""

    forward: int
    backward: int


def peak_bytes(cp_comm_type: str, shard: Shard, cp: int, inner: int | None = None) -> Peak:
    """Upper bounds of one layer, without the workspace of kernel and collectives.

    With CP 1 and several documents, a kernel that takes them one by one adds what the longest of them needs.

    Args:
        inner: ranks that trade heads, for a2a+p2p.
    """
    if cp == 1 or cp_comm_type == "p2p":
        return _ring(shard, cp)
    if cp_comm_type == "all_gather":
        return _gathered(shard, cp)
    a = cp if cp_comm_type == "a2a" else inner
    assert a is not None, "a2a+p2p needs inner"
    # both shardings of what goes in and of what comes out, plus the attention between
    attention = _ring(shard, cp // a)
    packed = (shard.rows + shard.block) * shard.element_bytes
    rows = shard.rows * shard.element_bytes
    return Peak(
        2 * packed + rows + max(2 * rows, attention.forward),
        3 * rows + max(3 * packed, packed + attention.backward),
    )


def flash_scratch(shard: Shard, keys: int, documents: int = 1, copies: int = 1) -> int:
    """Bytes that flash attention's backward takes for itself: an fp32 dQ, and dK and dV of every query head.

    (flash-attention 2.8, csrc/flash_attn/flash_api.cpp.) cuDNN does not tell what it takes; it is booked alike.

    Args:
        keys: keys of the longest tile; all_gather's are longer than its rows.
        documents: told apart in one call; each is rounded up to 128 rows.
        copies: of dQ: 1, and ceil(multiprocessors / (batch * heads)) where the result is to be deterministic.
    """
    width = shard.batch * shard.heads * shard.head_dim
    repeated = 2 * keys * width * shard.element_bytes if shard.heads != shard.kv_heads else 0
    return 4 * copies * (shard.tokens + 128 * documents) * width + repeated


def _ring(s: Shard, n: int) -> Peak:
    e, acc = s.element_bytes, _accumulator(s)
    if n == 1:
        return Peak(s.rows * e + _lse(s), (s.rows + s.block) * e)
    running = s.rows * (acc + e)
    merged_copy = s.rows * acc if e < acc else 0
    forward = 2 * s.block * e + running + merged_copy + 5 * _lse(s)
    backward = 2 * s.block * (e + s.wire_bytes) + running + merged_copy + 3 * s.block * e // 2 + 2 * _lse(s)
    if s.wire_bytes < acc:
        backward += s.block * acc  # the travelling gradient is widened to be added to
    return Peak(forward, backward)


def _gathered(s: Shard, n: int) -> Peak:
    e, acc = s.element_bytes, _accumulator(s)
    running = s.rows * (acc + e)
    merged_copy = s.rows * acc if e < acc else 0
    forward = (n + 1) * s.block * e + running + merged_copy + 5 * _lse(s)
    # both halves' gradients in the accumulator (and on the wire, if narrower), one half's keys and kernel gradients
    sums = n * s.block * (acc + (s.wire_bytes if s.wire_bytes != acc else 0))
    backward = n * s.block * e * 3 // 2 + sums + running + merged_copy + 3 * s.block * acc + 2 * _lse(s)
    return Peak(forward, backward)


def _accumulator(s: Shard) -> int:
    return max(4, s.element_bytes)


def _lse(s: Shard) -> int:
    return s.tokens * s.batch * s.heads * _accumulator(s)
