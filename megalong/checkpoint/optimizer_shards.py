"""How do the optimizer's flat shards become whole tensors on disk, and shards again? Through one owner per parameter.

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
class Shard:
    """What one rank holds of a flattened parameter: elements start..end."""

    rank: int
    """In the DP x CP group."""
    start: int
    end: int


def shards_of(start: int, end: int, offset: int, numel: int, ranks: int) -> tuple[Shard, ...]:
    """Who holds which part of a parameter.

    Args:
        start, end: where it lies in the flat buffer.
        offset, numel: of the bucket that contains it; the bucket is cut into `ranks` equal shards.
    """
    assert numel % ranks == 0, (numel, ranks)
    assert offset <= start < end <= offset + numel, (start, end, offset, numel)
    width = numel // ranks
    first, last = (start - offset) // width, (end - 1 - offset) // width
    found = []
    for rank in range(first, last + 1):
        low, high = offset + rank * width, offset + (rank + 1) * width
        found.append(Shard(rank, max(start, low) - start, min(end, high) - start))
    return tuple(found)


def owner_of(shards: Sequence[Shard]) -> int:
    """The rank with the largest shard; the first of equals."""
    return max(shards, key=lambda s: (s.end - s.start, -s.rank)).rank


@dataclass(frozen=True)
class Spread:
    """A parameter and who holds it."""

    parameter: torch.nn.Parameter
    shards: tuple[Shard, ...]

    @property
    def owner(self) -> int:
        return owner_of(self.shards)

    def of(self, rank: int) -> Shard | None:
        """What a rank holds."""
        return next((s for s in self.shards if s.rank == rank), None)


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
            yield Spread(parameter, shards_of(start, end, held.offset, held.grad_data.numel(), ranks))


def sharded_tensors(
    optimizer: MegatronOptimizer, sharded_model: Any, loading: bool, keys: Sequence[str] = KEYS
) -> dict[str, Any]:
    """This rank's own of the optimizer's tensors, described as megatron-core does; every rank of the group calls it.

    Args:
        sharded_model: the model's `sharded_state_dict()`: shapes, cuts and names of the weights.
        loading: leave the tensors empty.
        keys: which of master weight and moments.
    """
    part = part_of(optimizer)
    entries = extract_sharded_tensors_and_factories(sharded_model)[0]
    weights = {entry.data: entry for entry in nested_values(entries)}
    mine = _empty(part, keys) if loading else _collect(part)
    tensors = {}
    for number, spread in enumerate(spreads(part)):
        weight = weights[spread.parameter]
        for key, whole in mine.get(number, {}).items():
            settings = {
                "key": disk_key(key, weight.key),
                "data": whole.view(spread.parameter.shape),
                "dtype": whole.dtype,
                "replica_id": (*weight.replica_id[:-1], 0),  # whatever the owner's rank, it is the one that writes
            }
            if isinstance(weight, ShardedTensorFactory):
                del settings["dtype"]
            tensors[f"{number}.{key}"] = replace(weight, **settings)
    return tensors


def disk_key(key: str, weight: str) -> str:
    """Key on disk of the master weight (`param`) or a moment of the weight with this key."""
    return f"optimizer.state.{key}.{weight}"


def load_tensors(optimizer: MegatronOptimizer, tensors: dict[str, Any], keys: Sequence[str] = KEYS) -> None:
    """Put back what `sharded_tensors(loading=True)` gave, filled; every rank of the group calls this."""
    part = part_of(optimizer)
    whole: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split(".")
        whole.setdefault(int(number), {})[key] = tensor.data.flatten()
    _hand_out(part, whole, keys)


def _mine(part: Any, spread: Spread, rank: int, keys: Sequence[str] = KEYS) -> dict[str, torch.Tensor]:
    """This rank's flat shards of a parameter, as they are in the optimizer."""
    shard = spread.of(rank)
    if shard is None:
        return {}
    tensors = part._get_main_param_and_optimizer_states(spread.parameter)
    flat = {key: tensors[key].view(-1) for key in keys}
    assert all(t.numel() == shard.end - shard.start for t in flat.values()), (spread, rank)
    return flat


def _empty(part: Any, keys: Sequence[str] = KEYS) -> dict[int, dict[str, torch.Tensor]]:
    rank = part.data_parallel_group.rank()
    return {
        number: {key: torch.empty(spread.parameter.numel(), dtype=torch.float32, device="cpu") for key in keys}
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
            for shard in spread.shards:
                for key in KEYS:
                    place = whole[number][key][shard.start : shard.end]
                    if shard.rank == rank:
                        place.copy_(here[key].detach())
                        continue
                    landing = torch.empty(place.shape, dtype=place.dtype, device=part.buffers[0].grad_data.device)
                    ops.append(dist.P2POp(dist.irecv, landing, away[shard.rank], part.data_parallel_group))
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


def _hand_out(part: Any, whole: dict[int, dict[str, torch.Tensor]], keys: Sequence[str] = KEYS) -> None:
    """Shards from the owners into every rank's optimizer."""
    for number, spread, rank, away in _walk(part):
        here = _mine(part, spread, rank, keys)
        ops, landed = [], []
        if spread.owner == rank:
            for shard in spread.shards:
                for key in keys:
                    source = whole[number][key][shard.start : shard.end]
                    if shard.rank == rank:
                        here[key].data.copy_(source)
                        continue
                    source = source.to(part.buffers[0].grad_data.device)
                    ops.append(dist.P2POp(dist.isend, source, away[shard.rank], part.data_parallel_group))
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
