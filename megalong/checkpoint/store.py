"""How is a saved training brought back, exactly, on any layout? What `saving` wrote, through megatron-core's
dist_checkpointing."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megalong.checkpoint.checksums import CHECKSUMS, Checksums
from megalong.runtime.errors import CheckpointError


def metadata() -> dict[str, Any]:
    """The canonical form of the optimizer state: one tensor per parameter, so that TP and PP may change between runs.
    A new dict every time, because megatron-core notes its process groups in it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def load_run(folder: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Bring back model, optimizer and random generators; returns the plain state with its `step`.

    Raises:
        CheckpointError: the files do not hold this model or this optimizer.
    """
    _prepare_to_load(optimizer)
    sharded_model = module_of(model).sharded_state_dict(metadata=metadata())
    wanted = {
        "model": sharded_model,
        "optimizer": optimizer.sharded_state_dict(sharded_model, is_loading=True, metadata=metadata()),
    }
    loaded = _load(wanted, folder)
    module_of(model).load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    _own_steps(optimizer)
    state = loaded["state"]
    _restore_rng(state.pop("rng"))
    return state


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


def _prepare_to_load(optimizer: MegatronOptimizer) -> None:
    """Two things that megatron-core (optimizer/distrib_optimizer.py) expects and torch's AdamW does not do.

    It loads into moments that are there already, while torch makes them in its first step. And torch keeps a `step`
    per parameter, which `_set_main_param_and_optimizer_states` looks for among the saved tensors though it travels in
    the parameter groups; the value that is there already stands in for it.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam):  # AdamW is one
            continue
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    moments = {k: torch.zeros_like(parameter) for k in ("exp_avg", "exp_avg_sq")}
                    adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        part._set_main_param_and_optimizer_states = functools.partial(_set_with_step, part)


def _own_steps(optimizer: MegatronOptimizer) -> None:
    """megatron-core gives all parameters one `step` tensor, which torch's AdamW then increments once per parameter:
    after a resume the bias correction would run ahead a hundredfold, without an error. Each gets its own again."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _set_with_step(part: Any, model_parameter: Any, tensors: dict[str, Any]) -> None:
    group, order = part.model_param_group_index_map[model_parameter]
    state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
    type(part)._set_main_param_and_optimizer_states(part, model_parameter, {"step": state["step"], **tensors})


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
