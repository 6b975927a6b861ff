"""Everything that a training step changes, and how it comes to be: from each kind of start, and into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_model_config

from megalong.checkpoint import load, pointer
from megalong.checkpoint.info import CheckpointInfo
from megalong.checkpoint.save import Contents
from megalong.convert.hf_folder import read_carried
from megalong.convert.parameters import load_hf_into
from megalong.data.cursor import Cursor
from megalong.data.windows import Windows
from megalong.evaluation.results import StageEvaluation, evaluation_from
from megalong.model.gpt import build
from megalong.model.llama import model_to_hf
from megalong.recipe.compose import to_yaml
from megalong.run import Run
from megalong.runtime.console import say, warn
from megalong.runtime.errors import CheckpointError
from megalong.runtime.launch import together
from megalong.runtime.watchdog import enter
from megalong.training.finite_weights import require_finite
from megalong.training.phases import GRADIENTS, timed
from megalong.training.start import FromHuggingFace, FromMegatron, Random, Resumed, Start
from megalong.training.step import build_optimizer


@dataclass
class State:
    """Of one rank."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    cursor: Cursor
    """Next sample of the run."""
    hf_config: dict[str, Any]
    """config.json that the weights came with; empty if none."""
    carried: Mapping[str, bytes]
    """Tokenizer and generation files for the export, on the first rank: name -> content."""
    step: int = 0
    """Steps done."""
    skipped: int = 0
    """Of them, steps that were left out because loss or gradient were not finite."""
    tokens_before: int = 0
    """Tokens that the stages before this one read."""
    evaluation: StageEvaluation | None = None
    damaged: list[Path] = field(default_factory=list)
    """Newer checkpoints of this run that were passed over."""


def load_state(run: Run, start: Start, train: Windows) -> State:
    """Build the model and bring it to where the run starts; needs megatron's parallel state, every rank calls this.

    Raises:
        CheckpointError: what the start names is damaged, or holds what is not finite.
    """
    enter("building the model")
    model = build(run)
    settings = get_model_config(model[0])
    settings.finalize_model_grads_func = partial(timed, GRADIENTS, settings.finalize_model_grads_func)
    enter("verifying the checkpoint")
    damaged: list[Path] = []
    has_masters = False
    if isinstance(start, Resumed):
        path, damaged = _sound(run.run_dir / "checkpoints", start.path)
        start = replace(start, path=path)
    elif isinstance(start, FromMegatron):
        together(partial(load.verify_checksums, start.path))
        enter("loading weights")
        has_masters = load.load_weights(start.path, model)
    elif isinstance(start, FromHuggingFace):
        together(partial(load.verify_checksums, start.path, required=False))
        enter("loading weights")
        together(partial(load_hf_into, model, start.path, run.model))
    origin = start.carried
    carried = together(lambda: read_carried(origin) if dist.get_rank() == 0 and origin is not None else {})
    enter("building the optimizer")
    # the optimizer copies the weights into its fp32 master weights: it is built once they are in place
    optimizer = build_optimizer(run, model)
    if isinstance(start, FromMegatron) and has_masters:
        enter("loading master weights")
        load.load_masters(start.path, model, optimizer)
        say(f"starting from the fp32 master weights of {start.path}")
    state = State(model, optimizer, Cursor.at_start(train), start.hf_config or {}, carried, damaged=damaged)
    if isinstance(start, FromMegatron):
        state.tokens_before = start.tokens_before
    if isinstance(start, Resumed):
        _restore(state, run, start.path, train)
    if not isinstance(start, Random):
        enter("looking for values that are not finite")
        require_finite(start.path, model, run.model, optimizer)
    return state


def _restore(state: State, run: Run, folder: Path, train: Windows) -> None:
    enter("loading weights and optimizer")
    found = load.load_run(folder, state.model, state.optimizer)
    state.step, state.skipped = found["step"], found["skipped"]
    state.cursor = Cursor.from_state_dict(found["cursor"])
    if "data.path" in run.config.checkpoint.allow_changed:
        state.cursor = state.cursor.moved_to(train, state.step)
    state.evaluation = evaluation_from(found["evaluation"]) if found["evaluation"] else None


def _sound(root: Path, newest: Path) -> tuple[Path, list[Path]]:
    """The newest checkpoint, from `newest` backwards, all of whose files are as they were written, and those before."""
    folder = newest
    damaged: list[Path] = []
    while True:
        try:
            together(partial(load.verify_checksums, folder))
            return folder, damaged
        except CheckpointError as error:
            before = pointer.older(root, folder)
            if before is None:
                raise
            warn(f"{error} Falling back to {before.name}; the damaged one is kept as {folder.name}.damaged.")
            damaged.append(folder)
            folder = before


def contents_of(state: State, run: Run) -> Contents:
    """What goes into a checkpoint besides the tensors."""
    evaluation = asdict(state.evaluation) if state.evaluation else None
    return Contents(
        state={"cursor": state.cursor.state_dict(), "skipped": state.skipped, "evaluation": evaluation},
        info=_info(state, run),
        config_yaml=to_yaml(run.config),
        carried=state.carried,
    )


def _info(state: State, run: Run) -> CheckpointInfo:
    dtype = "bfloat16" if run.config.precision == "bf16" else "float32"
    model = replace(run.model, rope_scaling=run.rope_scaling)
    hf_config = model_to_hf(model, theta=run.theta, window=run.seq_length, dtype=dtype, carried=state.hf_config)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):  # of the checkpoint, not of conf/model
        if token in state.hf_config:
            hf_config[token] = state.hf_config[token]
    return CheckpointInfo(
        hf_config=hf_config,
        stage=run.config.stage.name,
        seq_length=run.seq_length,
        theta=run.theta,
        step=state.step,
        consumed_samples=state.cursor.consumed_samples,
        tokens_before=state.tokens_before,
    )
