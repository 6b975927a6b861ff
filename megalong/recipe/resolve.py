"""From what the user said to one frozen `Run`: scale, theta and layout, in this order, each checked as it is found.

No process group and no model exists yet when this speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megalong.config.schema import Config, OptimizerConfig
from megalong.planning.choose import best_recompute
from megalong.planning.workload import workload_of
from megalong.recipe import checks
from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_for, stage_layout
from megalong.recipe.rope import plain_is_none, scaling_before_of, scaling_of
from megalong.recipe.stages import predecessor_point, scaled, theta_of
from megalong.run import Run


def run_of(overrides: Sequence[str], world_size: int | None = None) -> Run:
    """`resolve` of what a command line says.

    Raises:
        ConfigError: as `compose` and `resolve`; so for `LayoutError` and `ThetaError`.
    """
    return resolve(compose(overrides, world_size), world_size)


def resolve(config: Config, world_size: int | None = None) -> Run:
    """The run that a configuration describes; `config` itself stays what the user said.

    Args:
        world_size: ranks that were started; None: as many as the layout wants (planning).

    Raises:
        ConfigError: a value out of its range, or values that contradict each other.
        LayoutError: the layout does not fit the ranks, the model or the window.
        ThetaError: theta does not follow from the law.
    """
    checks.check_values(config)
    added = tuple(config.searchpath)
    stage = scaled(config.stage, config.model, config.scale, added)
    train = config.train
    steps = stage.steps if train.steps is None else train.steps
    lr = stage.lr if train.lr is None else train.lr
    batch = stage.global_batch_size if train.global_batch_size is None else train.global_batch_size
    stop_after = steps if train.stop_after is None else train.stop_after
    checks.check_stop(stop_after, steps)
    optimizer, decay_steps, wsd_steps = _decay(config.optimizer, steps)
    checks.check_decay(optimizer, lr)
    before = predecessor_point(stage, config.model, config.scale, added)
    theta = theta_of(stage, config.model, before)
    scaling, scaling_before = (
        scaling_of(stage, config.model),
        scaling_before_of(stage, config.model, config.scale, added),
    )
    checks.check_rope(config.model, theta)
    checks.check_stage_rope(scaling, config.model, theta)
    suffix = "" if config.scale.name == "full" else f"-{config.scale.name}"
    run_dir = f"runs/{stage.name}{suffix}" if config.run_dir is None else config.run_dir
    complete = replace(
        config,
        stage=replace(stage, theta=theta),
        optimizer=optimizer,
        train=replace(train, steps=steps, lr=lr, global_batch_size=batch),
        run_dir=run_dir,
    )
    run = Run(
        config=complete,
        seq_length=stage.seq_length,
        theta=theta,
        before=before,
        layout=stage_layout(stage),
        steps=steps,
        stop_after=stop_after,
        lr=lr,
        decay_steps=decay_steps,
        wsd_steps=wsd_steps,
        global_batch_size=batch,
        recompute=train.recompute,
        mlp_chunk=train.mlp_chunk,
        run_dir=Path(run_dir),
        rope_scaling=scaling_before if scaling is None else plain_is_none(scaling),
        rope_scaling_before=scaling_before,
    )
    run = run.on(layout_for(run, world_size))
    checks.check_layout(run)
    checks.check_evaluation(run)
    work = workload_of(run)
    recompute = best_recompute(work, config.cluster)
    checks.check_activations(config.attention.backend, replace(train, recompute=recompute))
    checks.check_profile(run)
    return replace(run, recompute=recompute, mlp_chunk=work.mlp_tile)


def _decay(said: OptimizerConfig, steps: int) -> tuple[OptimizerConfig, int, int]:
    """The optimizer's settings with the lengths of its decay, where it has one, and these lengths.

    A constant rate leaves them open, so that `config.yaml` says nothing of what has no effect, and a run from before
    there was a decay is still the same run.
    """
    decay_steps = steps if said.decay_steps is None else said.decay_steps
    tail = max(1, decay_steps - said.warmup_steps)
    wsd_steps = min(max(1, decay_steps // 10), tail) if said.wsd_steps is None else said.wsd_steps
    if said.decay != "constant":
        said = replace(said, decay_steps=decay_steps)
    if said.decay == "wsd":
        said = replace(said, wsd_steps=wsd_steps)
    return said, decay_steps, wsd_steps
