"""A checkpoint is opened for evaluation: its own shape, theta and window, on any layout, without an optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from megalong.checkpoint.info import HF_FILES, read_info
from megalong.checkpoint.load import load_weights, verify_checksums
from megalong.checkpoint.pointer import resolve
from megalong.config.schema import AttentionConfig, Config, ModelConfig, StageConfig, TopologyConfig
from megalong.convert.hf_folder import is_hf, read_config
from megalong.convert.megatron_dir import is_megatron
from megalong.convert.parameters import load_hf_into
from megalong.model.gpt import build_module
from megalong.model.llama import model_from_hf
from megalong.rope.theta import RotaryPoint
from megalong.run import Run
from megalong.runtime.errors import CheckpointError, LayoutError
from megalong.runtime.launch import together
from megalong.topology.groups import initialize
from megalong.topology.layout import Layout
from megalong.topology.valid import check_layout


@dataclass(frozen=True)
class Checkpoint:
    """A directory that holds a model, told apart and read as far as its config."""

    folder: Path
    """The directory that is read: for a run_dir, its newest checkpoint."""
    kind: str
    """hf or megatron."""
    model: ModelConfig

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer's files lie, if there are any."""
        return self.folder / HF_FILES if self.kind == "megatron" else self.folder


def find_checkpoint(folder: Path) -> Checkpoint:
    """What lies in a directory.

    Args:
        folder: Hugging Face directory, Megatron checkpoint, or run_dir.

    Raises:
        CheckpointError: nothing that can be evaluated: missing, empty, or without a config.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty: give a Hugging Face directory, a Megatron checkpoint or a run_dir.")
    if is_megatron(folder) or (folder / "checkpoints").is_dir() or (folder / "latest").is_file():
        found = resolve(folder)
        return Checkpoint(found, "megatron", model_from_hf(read_info(found).hf_config, str(found)))
    if is_hf(folder):
        return Checkpoint(folder, "hf", model_from_hf(read_config(folder), str(folder / "config.json")))
    names = ", ".join(sorted(os.listdir(folder))[:5])
    raise CheckpointError(
        f"{folder} is neither a Hugging Face directory (config.json and *.safetensors) nor a Megatron checkpoint nor "
        f"a run_dir; it holds {names}."
    )


def evaluation_run(model: ModelConfig, layout: Layout, *, cp_comm_type: str = "p2p", precision: str = "bf16") -> Run:
    """The run under which a model is only looked at: its own theta and window.

    Raises:
        LayoutError: the layout does not fit the model.
    """
    window, theta = model.max_position_embeddings, float(model.rope_theta)
    # lengths are cut as they come; of the layout only what the heads and layers allow is checked here
    check_layout(
        layout, model, 2 * layout.cp * layout.tp, layout.dp, cp_comm_type=cp_comm_type, hierarchical_sizes=None
    )
    config = Config(
        stage=StageConfig("evaluation", window, None, "fixed", layout.dp, 1, 1e-5, theta=theta),
        model=model,
        precision=precision,
        topology=TopologyConfig(**asdict(layout)),
        attention=AttentionConfig(cp_comm_type=cp_comm_type),
    )
    return Run(
        config=config,
        seq_length=window,
        theta=theta,
        before=RotaryPoint(theta, window),
        layout=layout,
        steps=1,
        stop_after=1,
        decay_steps=1,
        wsd_steps=1,
        lr=1e-5,
        global_batch_size=layout.dp,
        recompute="none",
        mlp_chunk=0,
        run_dir=Path("."),
        rope_scaling=model.rope_scaling,
        rope_scaling_before=model.rope_scaling,
    )


def layout_for(world: int, tp: int, cp: int, pp: int) -> Layout:
    """The layout with these sizes on so many ranks; the rest is data parallel.

    Raises:
        LayoutError: the ranks are not a multiple.
    """
    size = tp * cp * pp
    if min(tp, cp, pp) < 1 or world % size:
        raise LayoutError(
            f"tp={tp} cp={cp} pp={pp} take {size} ranks, but {world} were started: start a multiple of {size} "
            f"(torchrun --nproc-per-node {size} tools/evaluate.py ...), or give other sizes."
        )
    return Layout(tp, cp, pp, world // size)


@contextmanager
def opened(checkpoint: Checkpoint, run: Run) -> Iterator[list[torch.nn.Module]]:
    """The model on this rank, loaded, as `score` takes it; megatron's parallel state lives as long as the block.

    Raises:
        CheckpointError: the files are damaged or of another model.
    """
    own_state = not parallel_state.model_parallel_is_initialized()
    if own_state:
        initialize(run.layout, run.config.attention.hierarchical_context_parallel_sizes)
    try:
        model: list[torch.nn.Module] = [_Whole(build_module(run))]
        if checkpoint.kind == "hf":
            together(lambda: verify_checksums(checkpoint.folder, required=False))
            together(lambda: load_hf_into(model, checkpoint.folder, checkpoint.model))
        else:
            together(lambda: verify_checksums(checkpoint.folder))
            load_weights(checkpoint.folder, model)  # type: ignore[arg-type]
        yield model
    finally:
        if own_state:
            parallel_state.destroy_model_parallel()


class _Whole(torch.nn.Module):
    """Stands where megatron's DistributedDataParallel stands around a model that is trained."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.config = getattr(module, "config", None)

    def set_input_tensor(self, tensor: torch.Tensor) -> None:
        self.module.set_input_tensor(tensor)  # type: ignore[operator]

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        found: torch.Tensor = self.module(*args, **kwargs)
        return found
