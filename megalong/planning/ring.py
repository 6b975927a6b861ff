"""Context-parallel attention step by step: what of its travel is hidden, and which wires carry it.

Step by step as the algorithms of `megalong.attention` run: a transfer is started, one step is computed, the transfer
is awaited. Hidden is the part of a transfer that fits behind the step beside it; exposed is the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalong.attention import traffic
from megalong.planning.workload import Workload
from megalong.topology.links import NOTHING, Wire, slowest, wires
from megalong.topology.placement import Placement, groups


@dataclass(frozen=True)
class Pass:
    """One forward or backward pass of one attention layer on one rank, seconds."""

    compute: float
    travel: float
    """Time that the transfers would take by themselves."""
    exposed: float
    """Part of `travel` during which nothing is computed."""
    hop_bytes: int
    """Largest message of one ring hop."""

    @property
    def hidden(self) -> float:
        return self.travel - self.exposed

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Moves:
    """The wires of one context-parallel group."""

    ring: Wire
    """Slowest hop of the ring (p2p, and the outer ring of a2a+p2p), or of the gather."""
    heads: Wire
    """Slowest hop of the head exchange."""


def attention_flops(work: Workload) -> float:
    """Forward FLOPs of one layer, one micro-batch and one rank: 4*D per visible pair and head."""
    visible = ((work.attended or work.seq_length) + 1) / 2  # keys of a token, on average
    shard = work.shard
    return 4 * shard.heads * shard.head_dim * work.seq_length * visible / work.layout.cp


def moves_of(work: Workload, placement: Placement) -> Moves:
    """Wires of the context-parallel groups, all of them moving at once."""
    if work.layout.cp == 1:
        return Moves(NOTHING, NOTHING)
    rings = groups(work.layout, "cp")
    a = work.inner
    if work.cp_comm_type == "all_gather":
        return Moves(slowest(placement, rings, reorder=work.reorders), NOTHING)
    outer = [ring[i::a] for ring in rings for i in range(a)]
    inner = [ring[i : i + a] for ring in rings for i in range(0, len(ring), a)]
    return Moves(slowest(placement, outer), slowest(placement, inner, exchange=True))


def forward_pass(work: Workload, moves: Moves, flops_per_second: float) -> Pass:
    """One forward pass at an attention rate in FLOP/s (of visible pairs)."""
    compute = attention_flops(work) / flops_per_second
    block = work.shard.block * work.element_bytes
    n = work.layout.cp // work.inner
    if work.layout.cp == 1:
        return Pass(compute, 0.0, 0.0, 0)
    if work.cp_comm_type == "all_gather":
        whole = moves.ring.seconds((work.layout.cp - 1) * block, work.layout.cp - 1)
        # early chunks arrive beside the own block, late ones beside the early ones
        return _steps([(compute / work.layout.cp, whole / 2), (compute / 2, whole / 2)], compute, block)
    hop = moves.ring.seconds(block)
    ring = _steps([(compute / n, hop)] * (n - 1), compute, block)
    return _with_heads(ring, work, moves)


def backward_pass(work: Workload, moves: Moves, flops_per_second: float) -> Pass:
    """One backward pass at an attention rate in FLOP/s (2.5 times the forward FLOPs)."""
    compute = 2.5 * attention_flops(work) / flops_per_second
    block = work.shard.block * work.element_bytes
    home = work.shard.block * work.shard.wire_bytes
    n = work.layout.cp // work.inner
    if work.layout.cp == 1:
        return Pass(compute, 0.0, 0.0, 0)
    if work.cp_comm_type == "all_gather":
        cp = work.layout.cp
        gather = moves.ring.seconds((cp - 1) * block, cp - 1) / 2
        scatter = moves.ring.seconds((cp - 1) * home, cp - 1) / 2
        own = compute / cp / 2
        steps = [(own, gather), (compute / 2, gather), (compute / 2 + own, scatter), (0.0, scatter)]
        return _steps(steps, compute, home)
    keys, gradients = moves.ring.seconds(block), moves.ring.seconds(home)
    step = compute / n
    # half of the own block beside the first keys; then keys and, one step behind, their gradients; half at the end
    steps = [(step / 2, keys)]
    steps += [(step, (keys if s + 1 < n else 0.0) + (gradients if s > 1 else 0.0)) for s in range(1, n)]
    steps += [(step / 2, gradients)]
    ring = _steps(steps if n > 1 else [], compute, block + home if n > 2 else home)
    return _with_heads(ring, work, moves)


def _steps(steps: Sequence[tuple[float, float]], compute: float, hop_bytes: int) -> Pass:
    """Transfers beside computing: (seconds computed, seconds travelled) of each step."""
    exposed = sum(max(0.0, travel - computed) for computed, travel in steps)
    return Pass(compute, sum(travel for _, travel in steps), exposed, hop_bytes)


def _with_heads(ring: Pass, work: Workload, moves: Moves) -> Pass:
    """Add the head exchange: pieces arrive and leave beside the computing of others, the first and last in the open."""
    a = work.inner
    if a == 1:
        return ring
    pieces, travel = _head_exchange(work, moves)
    open_ = travel / pieces
    hidden_at_most = ring.seconds * (pieces - 1) / pieces
    exposed = open_ + max(0.0, travel - open_ - hidden_at_most)
    return Pass(ring.compute, ring.travel + travel, ring.exposed + min(travel, exposed), ring.hop_bytes)


def _head_exchange(work: Workload, moves: Moves) -> tuple[int, float]:
    """(pieces in which heads are traded for sequence and back, seconds that all of them travel)."""
    a, per_rank = work.inner, work.shard.kv_heads // work.inner
    pieces = 2 if per_rank == 1 and work.layout.cp == a else per_rank
    size = traffic.forward_bytes("a2a", work.shard, a)["a2a"]
    return pieces, moves.heads.seconds(size, 2 * pieces * (a - 1))


def exposed_again(work: Workload, moves: Moves, forward: Pass) -> float:
    """Exposed seconds of a second forward pass: kept attention trades heads again, with nothing to hide behind."""
    if work.again.attention:
        return forward.exposed
    return _head_exchange(work, moves)[1] if work.keeps_attention and work.inner > 1 else 0.0


@dataclass(frozen=True)
class RingRow:
    """One class of hops of all rings, in one direction of one attention layer."""

    direction: str
    """forward or backward."""
    edge: str
    """pair, node, leaf or spine."""
    hops: int
    """Hops of this class over all rings."""
    bytes_per_hop: int
    needed_gbs: float
    """Bandwidth that hides a hop behind the step computed beside it, GB/s."""
    available_gbs: float
    hop_ms: float
    hidden_ms: float
    """Per hop, at this hop's own wire."""
    exposed_ms: float


def ring_map(work: Workload, placement: Placement, forward: Pass, backward: Pass) -> list[RingRow]:
    """Rows for the ring (the outer one of a2a+p2p), forward then backward, slowest wire first."""
    n = work.layout.cp // work.inner
    if n == 1:
        return []
    rings = [ring[i :: work.inner] for ring in groups(work.layout, "cp") for i in range(work.inner)]
    found = wires(placement, rings, reorder=work.cp_comm_type == "all_gather")
    return [
        _row(direction, one, wire, n)
        for direction, one in (("forward", forward), ("backward", backward))
        for wire in found
    ]


def _row(direction: str, one: Pass, wire: Wire, steps: int) -> RingRow:
    step, hop = one.compute / steps, wire.seconds(one.hop_bytes)
    return RingRow(
        direction=direction,
        edge=wire.edge,
        hops=wire.count,
        bytes_per_hop=one.hop_bytes,
        needed_gbs=one.hop_bytes / max(step - wire.latency_s, 1e-9) / 1e9,
        available_gbs=wire.bytes_per_second / 1e9,
        hop_ms=hop * 1e3,
        hidden_ms=min(hop, step) * 1e3,
        exposed_ms=max(0.0, hop - step) * 1e3,
    )
