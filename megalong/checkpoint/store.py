"""How is a saved training brought back, exactly, on any layout? What `saving` wrote, through megatron-core's
dist_checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megalong.checkpoint.checksums import CHECKSUMS, Checksums
from megalong.checkpoint.optimizer_shards import load_state, part_of, sharded_state
from megalong.runtime.errors import CheckpointError


def metadata() -> dict[str, Any]:
    """How the tensors are cut on disk. A new dict every time, because megatron-core notes its process groups in it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def load_run(folder: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Bring back model and optimizer; returns the plain state with its `step`.

    Raises:
        CheckpointError: the files do not hold this model or this optimizer.
    """
    make_moments(optimizer)
    sharded_model = module_of(model).sharded_state_dict(metadata=metadata())
    optimizer_state = sharded_state(optimizer, sharded_model, loading=True)
    loaded = _load({"model": sharded_model, "optimizer": optimizer_state}, folder)
    module_of(model).load_state_dict(loaded["model"])
    load_state(optimizer, loaded["optimizer"])
    _own_steps(optimizer)
    return dict(loaded["state"])


def load_weights(folder: Path, model: list[DistributedDataParallel]) -> None:
    """Bring back the weights alone, as the start of another stage.

    Raises:
        CheckpointError: the files do not hold this model.
    """
    loaded = _load({"model": module_of(model).sharded_state_dict(metadata=metadata())}, folder)
    module_of(model).load_state_dict(loaded["model"])


def verify_checksums(folder: Path) -> None:
    """Read every file of a checkpoint and compare its SHA-256; ranks share the files among them.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    checksums = Checksums(folder)
    if checksums.sums is None:
        raise CheckpointError(f"{folder} has no {CHECKSUMS}: it was not written by megalong. Convert it again.")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for name in sorted(checksums.sums)[rank::world]:
        checksums.check(name)


def module_of(model: list[DistributedDataParallel]) -> Any:
    assert len(model) == 1, "one model chunk per rank"
    return model[0].module


def _load(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RAISE_UNEXPECTED)
    except (dist_checkpointing.core.CheckpointingException, OSError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} cannot be loaded into this model: {first}") from error


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its moments, zero where it has none yet: torch's AdamW makes them in its first step, while
    megatron-core (optimizer/distrib_optimizer.py) expects them when it saves and when it loads."""
    adam = part_of(optimizer).optimizer
    if not isinstance(adam, torch.optim.Adam):  # AdamW is one
        return
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                moments = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}


def _own_steps(optimizer: MegatronOptimizer) -> None:
    """megatron-core gives all parameters one `step` tensor, which torch's AdamW then increments once per parameter:
    after a resume the bias correction would run ahead a hundredfold, without an error. Each gets its own again."""
    for state in part_of(optimizer).optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
