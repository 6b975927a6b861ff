"""Do the settings of different groups fit together? Every check runs before a process group or a model exists."""

from __future__ import annotations

from megalong.config.schema import Config
from megalong.recipe.layout import layout_of
from megalong.runtime.errors import ConfigError
from megalong.topology.valid import check_layout as check_valid_layout

CHOICES = {
    "precision": ("bf16", "fp32"),
    "attention.backend": ("megalong", "transformer_engine"),
    "attention.kernel": ("auto", "cpu_flash", "cuda_flash", "cudnn", "reference"),
    "attention.cp_comm_type": ("p2p", "a2a", "a2a+p2p", "all_gather"),
    "attention.document_mask": ("none", "intra"),
    "attention.grad_wire_dtype": ("fp32", "model"),
    "data.loader": ("memmap", "dali"),
    "train.recompute": ("none", "selective", "full"),
    "train.non_finite": ("skip", "stop"),
}


def check_values(config: Config) -> None:
    """Names that must be one of a few, numbers that must be positive.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for key, allowed in CHOICES.items():
        value: object = config
        for part in key.split("."):
            value = getattr(value, part)
        if value not in allowed:
            raise ConfigError(f"{key}={value!r}: choose one of {', '.join(allowed)}.")
    train = config.train
    for name, number in (
        ("train.steps", train.steps),
        ("train.global_batch_size", train.global_batch_size),
        ("stage.seq_length", config.stage.seq_length),
    ):
        if number is None or number < 1:
            raise ConfigError(f"{name}={number}: must be at least 1.")
    if train.lr is None or not train.lr > 0:
        raise ConfigError(f"train.lr={train.lr}: must be positive.")
    if train.stop_after is not None and not 0 < train.stop_after <= (train.steps or 0):
        raise ConfigError(f"train.stop_after={train.stop_after}: must lie between 1 and train.steps={train.steps}.")
    for name, number in (
        ("train.loss_chunk", train.loss_chunk),
        ("checkpoint.save_steps", config.checkpoint.save_steps),
        ("data.eval_sequences", config.data.eval_sequences),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps),
    ):
        if number < 0:
            raise ConfigError(f"{name}={number}: must not be negative.")


def check_layout(config: Config) -> None:
    """The layout fits the model, the window and the batch.

    Raises:
        LayoutError: naming what does not divide, and the nearest layout that would.
        ConfigError: a backend or algorithm that the layout excludes.
    """
    layout = layout_of(config)
    assert config.train.global_batch_size is not None
    check_valid_layout(
        layout,
        config.model,
        config.stage.seq_length,
        config.train.global_batch_size,
        cp_comm_type=config.attention.cp_comm_type,
        hierarchical_sizes=config.attention.hierarchical_context_parallel_sizes,
    )
    if config.attention.backend == "transformer_engine" and config.attention.document_mask != "none":
        raise ConfigError(
            "attention.backend=transformer_engine does not know attention.document_mask=intra; use backend=megalong."
        )
