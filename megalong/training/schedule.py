"""What learning rate does a step have? A function of the step alone: linear warm-up, then constant or a decay.

The schedule is megatron-core's, asked anew for every step, so nothing of it is saved and a resume has what the unbroken
run would have had. megatron counts from a rate of 0 before the first step to `min_lr` at the last one; both would be
steps that change nothing. So step k, counted from 0, is its point k + 1 of a schedule one step longer at either end:
the first step of a warm-up is not zero, the peak is reached in the step after it, and `min_lr` would be the rate of the
step after the last. Between them these are the values of torch's and transformers' schedules.
"""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megalong.run import Run


def scheduler(run: Run, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """megatron's scheduler of learning rate and weight decay for a run; the weight decay is constant."""
    settings = run.config.optimizer
    warmup = settings.warmup_steps + 1
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=run.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        # without a decay only megatron's own check of the order of the two looks at it
        lr_decay_steps=max(run.decay_steps, warmup) + 1,
        lr_decay_style="WSD" if settings.decay == "wsd" else settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=run.wsd_steps,
        lr_wsd_decay_style=settings.wsd_shape,
    )


def set_rates(schedule: OptimizerParamScheduler, step: int) -> float:
    """Give every parameter group the learning rate and weight decay of a step counted from 0.

    Returns:
        the learning rate.
    """
    schedule.num_steps = step + 1
    schedule.step(0)
    lr = float(schedule.get_lr({}))
    if schedule.num_steps == schedule.lr_warmup_steps:  # megatron's peak * n / n may be off by a bit
        lr = schedule.max_lr
        for group in schedule.optimizer.param_groups:
            group["lr"] = lr
    return lr
