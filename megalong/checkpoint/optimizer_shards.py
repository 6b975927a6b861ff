"""How do the flat shards of the distributed optimizer become whole tensors on disk, and shards again?

megatron's distributed optimizer cuts one flat buffer of all parameters into equal shards, one per rank of the
DP x CP group. On disk every parameter has whole fp32 tensors (master weight and two moments) in the parameter's own
shape, cut like the weight itself, so that any later TP, PP, CP and DP can read them. Each parameter has one owner, the
rank with the largest part of it: the others send it their parts (saving) or get them from it (loading). A rank holds
about its own share at any time, the state crosses the network once, and most of it not at all.

megatron-core 0.16 writes the same format (`fully_reshardable`), but gathers the whole state of all parameters in the
host memory of every rank, 12 bytes per parameter of the model shard, and each rank reads all of it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer

KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a flattened parameter: elements start..end."""

    rank: int
    """In the DP x CP group."""
    start: int
    end: int


def pieces_of(start: int, end: int, offset: int, numel: int, ranks: int) -> tuple[Piece, ...]:
    """Who holds which part of a parameter.

    Args:
        start, end: where it lies in the flat buffer.
        offset, numel: of the bucket that contains it; the bucket is cut into `ranks` equal shards.
    """
    assert numel % ranks == 0, (numel, ranks)
    assert offset <= start < end <= offset + numel, (start, end, offset, numel)
    shard = numel // ranks
    first, last = (start - offset) // shard, (end - 1 - offset) // shard
    found = []
    for rank in range(first, last + 1):
        low, high = offset + rank * shard, offset + (rank + 1) * shard
        found.append(Piece(rank, max(start, low) - start, min(end, high) - start))
    return tuple(found)


def owner_of(pieces: Sequence[Piece]) -> int:
    """The rank with the largest piece; the first of equals."""
    return max(pieces, key=lambda p: (p.end - p.start, -p.rank)).rank


@dataclass(frozen=True)
class Spread:
    """A parameter and who holds it."""

    parameter: torch.nn.Parameter
    pieces: tuple[Piece, ...]

    @property
    def owner(self) -> int:
        return owner_of(self.pieces)

    def of(self, rank: int) -> Piece | None:
        """What a rank holds."""
        return next((p for p in self.pieces if p.rank == rank), None)


def part_of(optimizer: MegatronOptimizer) -> Any:
    """megatron's one distributed optimizer (a dense model has no second one for experts)."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(parts) == 1, parts
    return parts[0]


def spreads(part: Any) -> Iterator[Spread]:
    """All parameters of this model shard in one order, the same on every rank of the group."""
    ranks = part.data_parallel_group.size()
    for buffer in part.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            held = buffer.buckets[bucket]
            yield Spread(parameter, pieces_of(start, end, held.offset, held.grad_data.numel(), ranks))


def sharded_state(optimizer: MegatronOptimizer, sharded_model: Any, loading: bool) -> dict[str, Any]:
    """What megatron's dist_checkpointing saves or loads for the optimizer; every rank of the group calls this.

    Args:
        sharded_model: the model's `sharded_state_dict()`: shapes, cuts and names of the weights.
        loading: leave the tensors empty.
    """
    part = part_of(optimizer)
    entries = extract_sharded_tensors_and_factories(sharded_model)[0]
    weights = {entry.data: entry for entry in nested_values(entries)}
    mine = _empty(part) if loading else _collect(part)
    tensors = {}
    for number, spread in enumerate(spreads(part)):
        weight = weights[spread.parameter]
        for key, whole in mine.get(number, {}).items():
            settings = {
                "key": f"optimizer.state.{key}.{weight.key}",
                "data": whole.view(spread.parameter.shape),
                "dtype": whole.dtype,
                "replica_id": (*weight.replica_id[:-1], 0),  # whatever the owner's rank, it is the one that writes
            }
            if isinstance(weight, ShardedTensorFactory):
                del settings["dtype"]
            tensors[f"{number}.{key}"] = replace(weight, **settings)
    return {"common": part.state_dict(), "tensors": tensors}


def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Put back what `sharded_state(loading=True)` asked for; every rank of the group calls this."""
    part = part_of(optimizer)
    part.load_state_dict(loaded["common"])
    whole: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in loaded["tensors"].items():
        number, key = name.split(".")
        whole.setdefault(int(number), {})[key] = tensor.flatten()
    _hand_out(part, whole)


def _mine(part: Any, spread: Spread, rank: int) -> dict[str, torch.Tensor]:
    """This rank's flat pieces of a parameter, as they are in the optimizer."""
    piece = spread.of(rank)
    if piece is None:
        return {}
    tensors = part._get_main_param_and_optimizer_states(spread.parameter)
    flat = {key: tensors[key].view(-1) for key in KEYS}
    assert all(t.numel() == piece.end - piece.start for t in flat.values()), (spread, rank)
    return flat


def _empty(part: Any) -> dict[int, dict[str, torch.Tensor]]:
    rank = part.data_parallel_group.rank()
    return {
        number: {key: torch.empty(spread.parameter.numel(), dtype=torch.float32, device="cpu") for key in KEYS}
        for number, spread in enumerate(spreads(part))
        if spread.owner == rank
    }


def _collect(part: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Whole parameters on their owners, in host memory."""
    whole = _empty(part)
    for number, spread, rank, away in _walk(part):
        here = _mine(part, spread, rank)
        ops, arrived = [], []
        if spread.owner == rank:
            for piece in spread.pieces:
                for key in KEYS:
                    place = whole[number][key][piece.start : piece.end]
                    if piece.rank == rank:
                        place.copy_(here[key].detach())
                        continue
                    landing = torch.empty(place.shape, dtype=place.dtype, device=part.buffers[0].grad_data.device)
                    ops.append(dist.P2POp(dist.irecv, landing, away[piece.rank], part.data_parallel_group))
                    arrived.append((place, landing))
        else:
            ops = [
                dist.P2POp(dist.isend, t.detach().contiguous(), away[spread.owner], part.data_parallel_group)
                for t in here.values()
            ]
        _wait(ops)
        for place, landing in arrived:
            place.copy_(landing)
    return whole


def _hand_out(part: Any, whole: dict[int, dict[str, torch.Tensor]]) -> None:
    """Pieces from the owners into every rank's optimizer."""
    for number, spread, rank, away in _walk(part):
        here = _mine(part, spread, rank)
        ops, landed = [], []
        if spread.owner == rank:
            for piece in spread.pieces:
                for key in KEYS:
                    source = whole[number][key][piece.start : piece.end]
                    if piece.rank == rank:
                        here[key].data.copy_(source)
                        continue
                    source = source.to(part.buffers[0].grad_data.device)
                    ops.append(dist.P2POp(dist.isend, source, away[piece.rank], part.data_parallel_group))
            whole.pop(number)
        else:
            for tensor in here.values():
                landing = torch.empty_like(tensor)
                ops.append(dist.P2POp(dist.irecv, landing, away[spread.owner], part.data_parallel_group))
                landed.append((tensor, landing))
        _wait(ops)
        for tensor, landing in landed:
            tensor.data.copy_(landing)


def _walk(part: Any) -> Iterator[tuple[int, Spread, int, list[int]]]:
    """(number, spread, own rank, global ranks) of the parameters that this rank has a part in."""
    group = part.data_parallel_group
    dist.barrier(group)  # NCCL makes a group's communicator with all of its ranks, transfers below are between two
    rank, away = group.rank(), dist.get_process_group_ranks(group)
    for number, spread in enumerate(spreads(part)):
        if spread.of(rank) is not None:
            yield number, spread, rank, away


def _wait(ops: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()
