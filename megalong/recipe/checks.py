"""Do the settings of different groups fit together? Every check runs before a process group or a model exists."""

from __future__ import annotations

from typing import Any

from megalong.config.limits import check_limits
from megalong.config.schema import Config, ModelConfig, OptimizerConfig, TrainConfig
from megalong.recipe.keys import is_setting, no_such
from megalong.run import Run
from megalong.runtime.errors import ConfigError, ThetaError
from megalong.topology.valid import check_layout as check_valid_layout


def check_values(config: Config) -> None:
    """Every value lies in its range, before anything is computed from it.

    Raises:
        ConfigError: naming each wrong key, its value and what is allowed.
    """
    check_limits(config)
    model = config.model
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError(
            f"model.num_key_value_heads={model.num_key_value_heads} does not divide "
            f"model.num_attention_heads={model.num_attention_heads}: every key-value head serves as many heads."
        )
    for key in config.checkpoint.allow_changed:
        if not is_setting(key):
            raise ConfigError(f"checkpoint.allow_changed={config.checkpoint.allow_changed}: {no_such(key)}")


def check_stop(stop_after: int, steps: int) -> None:
    """A run stops within its schedule.

    Raises:
        ConfigError: naming the two values that met.
    """
    if stop_after > steps:
        raise ConfigError(f"train.stop_after={stop_after}: must lie between 1 and train.steps={steps}.")


def check_activations(backend: str, train: TrainConfig) -> None:
    """What is said of activations has an effect on the layers of this attention backend.

    Args:
        train: completed.

    Raises:
        ConfigError: naming the values that met.
    """
    ours = {
        "train.recompute=attention_kept": train.recompute == "attention_kept",
        "train.keep_on=host": train.keep_on == "host",
        f"train.mlp_chunk={train.mlp_chunk}": bool(train.mlp_chunk),
    }
    if backend == "transformer_engine" and (foreign := [said for said, is_said in ours.items() if is_said]):
        raise ConfigError(
            f"{', '.join(foreign)}: only megalong's own layers do that, not attention.backend=transformer_engine. Use "
            "attention.backend=megalong, or train.recompute=full, keep_on=device and mlp_chunk=0."
        )
    if train.keep_on == "host" and train.recompute not in ("full", "attention_kept"):
        raise ConfigError(
            f"train.keep_on=host has no effect with train.recompute={train.recompute}: what waits on the host are the "
            "inputs of recomputed layers. Use train.recompute=attention_kept or full, or leave it out."
        )


def check_profile(run: Run) -> None:
    """What is to be profiled will happen.

    Raises:
        ConfigError: naming the steps or ranks that there will not be.
    """
    train, ranks = run.config.train, run.layout.world_size
    if never := [step for step in train.profile or () if step > run.stop_after]:
        raise ConfigError(f"train.profile={train.profile}: this run ends with step {run.stop_after}, before {never}.")
    if train.profile and (nobody := [rank for rank in train.profile_ranks if rank >= ranks]):
        raise ConfigError(f"train.profile_ranks={train.profile_ranks}: there are {ranks} ranks, from 0; no {nobody}.")


def check_evaluation(run: Run) -> None:
    """What is asked on the way can be asked, and every setting of it has an effect.

    Raises:
        ConfigError: naming the values that met.
    """
    asked = run.config.evaluation
    if asked.every_steps and not run.config.data.eval_sequences:
        raise ConfigError(
            f"evaluation.every_steps={asked.every_steps} has no effect with data.eval_sequences=0, which leaves every "
            "evaluation out: ask for at least one sequence."
        )
    for key, value in (("lengths", asked.lengths), ("depths", asked.depths)):
        if value == []:
            raise ConfigError(f"evaluation.{key}=[]: give at least one. To ask nothing: evaluation.tasks=[].")
    if beyond := [length for length in asked.lengths or () if length > run.seq_length]:
        raise ConfigError(
            f"evaluation.lengths={asked.lengths}: {beyond} lie beyond the window of {run.seq_length:,} tokens, which "
            "this run plans its memory for. tools/evaluate.py asks beyond the window."
        )


def check_decay(optimizer: OptimizerConfig, lr: float) -> None:
    """The learning rate's schedule is one, and every setting of it has an effect.

    Args:
        optimizer: completed.
        lr: peak.

    Raises:
        ConfigError: naming the values that met.
    """
    said = f"optimizer.decay={optimizer.decay}"
    idle = [
        f"optimizer.{name}={value:g}"
        for name, value, kinds in (
            ("min_lr", optimizer.min_lr, ("linear", "cosine", "wsd")),
            ("decay_steps", optimizer.decay_steps, ("linear", "cosine", "wsd")),
            ("wsd_steps", optimizer.wsd_steps, ("wsd",)),
        )
        if value and optimizer.decay not in kinds
    ]
    if idle:
        better = "wsd" if idle[0].startswith("optimizer.wsd") else "linear, cosine or wsd"
        raise ConfigError(f"{', '.join(idle)} has no effect with {said}: leave it out, or choose {better}.")
    if optimizer.decay_steps is None:
        return
    if optimizer.min_lr > lr:
        raise ConfigError(f"optimizer.min_lr={optimizer.min_lr:g}: {said} cannot end above train.lr={lr:g}.")
    warmup, steps, tail = optimizer.warmup_steps, optimizer.decay_steps, optimizer.wsd_steps or 1
    if warmup + tail > steps:
        wsd = f" and optimizer.wsd_steps={tail}" if optimizer.wsd_steps else ""
        raise ConfigError(
            f"optimizer.warmup_steps={warmup}{wsd} do not fit into optimizer.decay_steps={steps} (the stage's steps, "
            f"if it is not given), which {said} takes."
        )


def check_rope(model: ModelConfig, theta: float) -> None:
    """The rotary embedding's dictionary, if there is one, has exactly the fields of its type.

    Raises:
        ConfigError: it is no dictionary.
        ThetaError: a field is missing, unknown or out of range.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ConfigError(f"model.rope_scaling={scaling!r}: give {{rope_type: ..., ...}}, or null.")
    from megalong.rope.frequencies import check_scaling  # imports torch, which a plan does without

    check_scaling(theta, model.head_dim, scaling)


def check_stage_rope(scaling: dict[str, Any] | None, model: ModelConfig, theta: float) -> None:
    """The rope dict of a stage has exactly the fields of its type.

    Raises:
        ThetaError: a field is missing, unknown or out of range.
    """
    if scaling is None:
        return
    from megalong.rope.frequencies import check_scaling  # imports torch, which a plan does without

    try:
        check_scaling(theta, model.head_dim, scaling)
    except ThetaError as error:
        raise ThetaError(f"stage.rope_scaling: {error}") from None


def check_layout(run: Run) -> None:
    """The layout fits the model, the window and the batch.

    Raises:
        LayoutError: naming what does not divide, and the nearest layout that would.
        ConfigError: a backend or algorithm that the layout excludes.
    """
    attention = run.config.attention
    check_valid_layout(
        run.layout,
        run.model,
        run.seq_length,
        run.global_batch_size,
        cp_comm_type=attention.cp_comm_type,
        hierarchical_sizes=attention.hierarchical_context_parallel_sizes,
    )
    if attention.backend == "transformer_engine" and attention.document_mask != "none":
        raise ConfigError(
            "attention.backend=transformer_engine does not know attention.document_mask=intra; use backend=megalong."
        )
