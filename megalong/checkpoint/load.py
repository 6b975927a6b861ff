"""How is a saved training brought back, exactly, on any layout? What `save` wrote, without running code from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megalong.checkpoint.checksums import CHECKSUMS, Checksums
from megalong.checkpoint.optimizer_shards import disk_key, load_tensors, part_of, sharded_tensors, spreads
from megalong.checkpoint.plain_values import COMMON, read_common
from megalong.checkpoint.sharded_reading import ShardedFolder, entries_of
from megalong.runtime.errors import CheckpointError
from megalong.runtime.launch import together
from megalong.runtime.watchdog import part

T = TypeVar("T")


def metadata() -> dict[str, Any]:
    """How the tensors are cut on disk. A new dict every time, because megatron-core notes its process groups in it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def load_run(folder: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Bring back model and optimizer; returns the plain state with its `step`. Every rank calls this.

    Raises:
        CheckpointError: the files do not hold this model or this optimizer.
    """
    make_moments(optimizer)
    sharded_model = module_of(model).sharded_state_dict(metadata=metadata())
    tensors = sharded_tensors(optimizer, sharded_model, loading=True)

    def read() -> dict[str, Any]:
        common = read_common(folder)
        with ShardedFolder(folder) as source:
            source.check_extra_states(dist.get_rank(), dist.get_world_size())
            source.fill([*_weights(source, sharded_model, model), *entries_of(tensors)])
        _load_settings(optimizer, common, folder / COMMON)
        return dict(common["state"])

    state = _reading(folder, read)
    load_tensors(optimizer, tensors)
    _own_steps(optimizer)
    return state


def load_weights(folder: Path, model: list[DistributedDataParallel]) -> bool:
    """Bring back the weights alone, as the start of another stage. Every rank calls this.

    Returns:
        whether the checkpoint has fp32 master weights, which `load_masters` brings back.

    Raises:
        CheckpointError: the files do not hold this model.
    """
    sharded_model = module_of(model).sharded_state_dict(metadata=metadata())

    def read() -> bool:
        with ShardedFolder(folder) as source:
            source.check_extra_states(dist.get_rank(), dist.get_world_size())
            source.fill(_weights(source, sharded_model, model))
            return any(key.startswith(disk_key("param", "")) for key in source.stored)

    return _reading(folder, read)


def load_masters(folder: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Bring back the fp32 master weights alone: a stage goes on from what the one before had, not from its rounding.

    Nothing to do where the weights themselves are fp32: they are their own masters. Every rank calls this.

    Raises:
        CheckpointError: the files do not hold the master weights of this model.
    """
    if all(spread.parameter.dtype == torch.float32 for spread in spreads(part_of(optimizer))):
        return
    sharded_model = module_of(model).sharded_state_dict(metadata=metadata())
    tensors = sharded_tensors(optimizer, sharded_model, loading=True, keys=("param",))

    def read() -> None:
        with ShardedFolder(folder) as source:
            source.fill(entries_of(tensors))

    _reading(folder, read)
    load_tensors(optimizer, tensors, keys=("param",))


def verify_checksums(folder: Path, required: bool = True) -> None:
    """Read every file of a checkpoint and compare its SHA-256; ranks share the files among them.

    Args:
        required: whether a folder without a list of checksums is refused.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    with _readable(folder):
        checksums = Checksums(folder)
        if checksums.sums is None:
            if required:
                raise CheckpointError(f"{folder} has no {CHECKSUMS}: it was not written by megalong. Convert it again.")
            return
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        own = sorted(checksums.sums)[rank::world]
        for number, name in enumerate(own, 1):
            part("file", number, len(own))
            checksums.check(name)


def module_of(model: list[DistributedDataParallel]) -> Any:
    assert len(model) == 1, "one model chunk per rank"
    return model[0].module


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}.") from error


def _reading(folder: Path, read: Callable[[], T]) -> T:
    """Read on every rank; what goes wrong on one is told on all, before they meet again."""

    def guarded() -> T:
        with _readable(folder):
            return read()

    return together(guarded)


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its moments, zero where it has none yet: an Adam makes them in its first step, while
    megatron-core (optimizer/distrib_optimizer.py) expects them when it saves and when it loads. torch's counts steps
    with each parameter, the fused ones with each group."""
    adam = part_of(optimizer).optimizer
    torchs = isinstance(adam, torch.optim.Adam)  # AdamW is one
    for group in adam.param_groups:
        if not torchs:
            group.setdefault("step", 0)
        for parameter in group["params"]:
            if not adam.state[parameter]:
                moments = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments} if torchs else moments


def _weights(source: ShardedFolder, sharded_model: Any, model: list[DistributedDataParallel]) -> list[ShardedTensor]:
    """The model's tensors and the keys to fill them from: a weight that is wider than what is stored of it comes from
    its master, so that an fp32 run goes on from all that a bf16 run knew."""
    entries = entries_of(sharded_model)
    filled = {entry.data.untyped_storage().data_ptr() for entry in entries if entry.data is not None}
    for name, parameter in module_of(model).named_parameters():
        assert parameter.untyped_storage().data_ptr() in filled, name
    rows = _real_vocabulary(model)
    found = []
    for entry in entries:
        shape, dtype = source.stored.get(entry.key, ((), entry.dtype))
        if entry.allow_shape_mismatch and shape and shape[0] < rows:
            raise CheckpointError(
                f"{source.folder} cannot be loaded into this model: {entry.key} has {shape[0]} rows for a vocabulary "
                f"of {rows}."
            )
        master = disk_key("param", entry.key)
        wider = entry.dtype == torch.float32 and dtype != torch.float32 and master in source.stored
        found.append(replace(entry, key=master) if wider else entry)
    return found


def _real_vocabulary(model: list[DistributedDataParallel]) -> int:
    """Tokens of the vocabulary, without the rows that only pad it."""
    inner = module_of(model)
    while not hasattr(inner, "real_vocab_size"):
        inner = inner.module
    return int(inner.real_vocab_size)


def _load_settings(optimizer: MegatronOptimizer, common: dict[str, Any], where: Path) -> None:
    """Step count and settings of the optimizer, from the common state. What this Adam needs and the one that wrote it
    does not know (`bias_correction` of the fused ones, `foreach` of torch's) is as this one was made."""
    try:
        now = optimizer.param_groups[0]
        for group in common["optimizer"]["common"]["optimizer"]["param_groups"]:
            for key, value in group.items():
                if not _alike(value, now.get(key)):
                    raise TypeError(f"{key} of the optimizer is {value!r}")
            group.update({k: v for k, v in part_of(optimizer).optimizer.defaults.items() if k not in group})
        if not isinstance(common["state"]["step"], int):
            raise TypeError("its step is no number")
        part_of(optimizer).load_state_dict(common["optimizer"]["common"])
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"{where} does not hold this run: {type(error).__name__}: {error}.") from error


def _alike(value: Any, now: Any) -> bool:
    """Whether a setting may stand where `now` stands; None, in either place, stands for any."""
    if isinstance(now, list | tuple) and isinstance(value, list | tuple):
        return len(now) == len(value) and all(map(_alike, value, now))
    if isinstance(now, int | float):
        return value is None or (isinstance(value, int | float) and math.isfinite(value))
    return value is None or now is None or isinstance(value, type(now))


def _own_steps(optimizer: MegatronOptimizer) -> None:
    """megatron-core gives all parameters one `step` tensor, which torch's AdamW then increments once per parameter:
    after a resume the bias correction would run ahead a hundredfold, without an error. Each gets its own again."""
    for state in part_of(optimizer).optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
