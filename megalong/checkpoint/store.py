"""How is a running training saved and brought back, exactly? megatron-core's dist_checkpointing in a folder that
gets its name only when it is whole.

A save goes to `step_00000010.partial`: sharded model and optimizer (any later TP, PP, CP, DP can load them), the
common state (step, cursor, random generators), `config.yaml`, `megalong.json` and `checksums.json`. When all ranks
have written, everything is synced, the folder is renamed, and only then does `latest` point to it.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megalong.checkpoint import pointer, writer
from megalong.checkpoint.checksums import CHECKSUMS, Checksums
from megalong.checkpoint.info import HF_FILES, CheckpointInfo, carry_files, write_info
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import commit_folder, fresh_folder, partial_of, sha256_of, sync, write_text


def _metadata() -> dict[str, Any]:
    """The canonical form of the optimizer state: one tensor per parameter, so that TP and PP may change between runs.
    A new dict every time, because megatron-core notes its process groups in it."""
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def save(
    root: Path,
    *,
    step: int,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    state: dict[str, Any],
    info: CheckpointInfo,
    config_yaml: str,
    carried: Path | None,
) -> Path:
    """Write one whole checkpoint below `root`; every rank calls this.

    Args:
        root: `run_dir/checkpoints`.
        state: plain values that are the same on every rank (cursor, counters).
        info: what `megalong.json` says.
        carried: folder with tokenizer and generation files that travel along to the next Hugging Face export.

    Returns:
        the folder of the checkpoint.
    """
    target = pointer.folder_of(root, step)
    partial = partial_of(target)
    first = dist.get_rank() == 0
    if first:
        fresh_folder(partial)
        if target.exists():  # the same step again, after a resume from an older one
            shutil.rmtree(target)
    dist.barrier()
    sharded_model = _module(model).sharded_state_dict(metadata=_metadata())
    everything = {
        "model": sharded_model,
        "optimizer": optimizer.sharded_state_dict(sharded_model, metadata=_metadata()),
        "state": {**state, "step": step, "rng": _rng_state()},
    }
    with writer.in_process():
        dist_checkpointing.save(everything, str(partial), content_metadata=_metadata())
    if first:
        write_text(partial / "config.yaml", config_yaml)
        write_info(partial, info)
        if carried is not None:
            carry_files(carried, partial / HF_FILES)
    _write_checksums(partial)
    if first:
        commit_folder(partial, target)
        pointer.point_to(root, target)
    dist.barrier()
    return target


def load_run(folder: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Bring back model, optimizer and random generators; returns the plain state with its `step`.

    Raises:
        CheckpointError: the files do not hold this model or this optimizer.
    """
    _prepare_to_load(optimizer)
    sharded_model = _module(model).sharded_state_dict(metadata=_metadata())
    wanted = {
        "model": sharded_model,
        "optimizer": optimizer.sharded_state_dict(sharded_model, is_loading=True, metadata=_metadata()),
    }
    loaded = _load(wanted, folder)
    _module(model).load_state_dict(loaded["model"])
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
    loaded = _load({"model": _module(model).sharded_state_dict(metadata=_metadata())}, folder)
    _module(model).load_state_dict(loaded["model"])


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


def _module(model: list[DistributedDataParallel]) -> Any:
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


def _write_checksums(partial: Path) -> None:
    """Each rank reads its share of the files; rank 0 writes the list."""
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    names = sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file())
    mine = {n: {"bytes": (partial / n).stat().st_size, "sha256": sha256_of(partial / n)} for n in names[rank::world]}
    for name in mine:
        sync(partial / name)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, mine)
    if rank == 0:
        merged = {name: entry for part in gathered for name, entry in part.items()}
        write_text(partial / CHECKSUMS, json.dumps(dict(sorted(merged.items())), indent=1) + "\n")


def _rng_state() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
