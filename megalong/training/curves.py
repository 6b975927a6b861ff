"""Which curves does TensorBoard show of a run, what is each of them, and which stand on one card?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megalong.training.phases import PHASES

HELD_OUT = (
    "Mean loss of held-out tokens in the last quarter of the window, nats per token: what the longer window is for."
)
DESCRIPTIONS = {
    "train/loss": "Mean cross-entropy over the valid tokens of the global batch, nats per token, before the update.",
    "train/grad_norm": "Global L2 norm of the gradient before clipping (optimizer.clip_grad).",
    "train/lr": "Learning rate of the step, a function of the step alone (optimizer.warmup_steps, optimizer.decay).",
    "train/tokens_per_second_per_gpu": "Tokens read per second and device over the whole step, data loading included.",
    "train/mfu": "Model FLOPs utilisation: FLOPs that the model needs (causal half of attention, no recompute) as a "
    "share of the cluster's dense bf16 peak.",
    "train/hfu": "Hardware FLOPs utilisation: FLOPs that are executed, recompute included, as a share of that peak.",
    "train/window": "Tokens of each sequence that the step reads; ones shorter than the window are packed to it.",
    "train/seconds": "Seconds of the whole step on the first rank, data loading included.",
    "train/peak_memory_GiB": "Highest memory of the first rank since its start, GiB; on CPU that of the process.",
    "phases/attention": "Seconds of a step that attention's block kernels take on the first rank.",
    "phases/waiting": "Seconds in which compute stands still for attention's collectives.",
    "phases/gradients": "Seconds of what follows the last backward pass: reducing gradients over replicas.",
    "phases/optimizer": "Seconds of clipping and AdamW.",
    "phases/data": "Seconds in which the next sequence is read.",
    "phases/other": "Seconds of all the rest: matrix products, elementwise operators, waiting for tensor- and "
    "pipeline-parallel neighbours.",
    "plan/step_seconds_predicted": "Seconds of a step by the plan made before the run.",
    "plan/step_seconds_actual": "Seconds of the step.",
    "plan/memory_MiB_predicted": "Memory of this rank by the plan, MiB.",
    "plan/memory_MiB_actual": "Highest memory of the first rank since its start, MiB.",
    "plan/sent_MiB_per_step_predicted": "MiB that the first rank sends in a step, by the plan.",
    "plan/sent_MiB_per_step_actual": "MiB that the first rank sent, counted at every collective of the first step of "
    "this attempt.",
    "attention_kernels/slowest_rank": "The rank whose attention kernels took longest in the step.",
    "attention_kernels/slowest_over_median": "How many times longer than the median of all ranks they took there. All "
    "have the same work, so far above 1 the node is slow.",
    "checkpoint/seconds": "Seconds from the beginning of a save until the checkpoint counted.",
    "checkpoint/blocked_seconds": "Seconds of it in which training waited.",
    "checkpoint/GiB": "Size of the checkpoint, GiB.",
    "evaluation_before/last_quarter_loss": f"{HELD_OUT} Before the stage.",
    "evaluation_after/last_quarter_loss": f"{HELD_OUT} After the stage.",
    "evaluation/last_quarter_loss": f"{HELD_OUT} At every evaluation.",
    "evaluation/short_loss": "Mean loss of held-out text cut to the base model's window, nats per token: what a longer "
    "window costs at the lengths that the base was made for.",
    "by_tokens/loss": "train/loss against tokens read by this stage and all before it.",
    "by_tokens/grad_norm": "train/grad_norm against tokens read by this stage and all before it.",
    "by_tokens/lr": "train/lr against tokens read by this stage and all before it.",
    "by_tokens/held_out_last_quarter": f"{HELD_OUT} Of all evaluations, against tokens read by all stages.",
}
"""What each curve shows, in which unit."""

BY_WINDOW = "_window_"
"""In a tag: of steps, or of held-out sequences, of this many tokens."""

CARDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "plan beside run": {
        "seconds of a step": ("plan/step_seconds_predicted", "plan/step_seconds_actual"),
        "memory, MiB": ("plan/memory_MiB_predicted", "plan/memory_MiB_actual"),
        "sent per step, MiB": ("plan/sent_MiB_per_step_predicted", "plan/sent_MiB_per_step_actual"),
    },
    "over all stages, by tokens": {
        "loss": ("by_tokens/loss", "by_tokens/held_out_last_quarter"),
        "learning rate": ("by_tokens/lr",),
    },
    "speed": {
        "utilisation": ("train/mfu", "train/hfu"),
        "seconds of a step by phase": tuple(f"phases/{name}" for name in PHASES),
    },
    "held-out text": {
        "loss, nats per token": ("evaluation/last_quarter_loss", "evaluation/short_loss"),
    },
}
"""Cards of the Custom Scalars page: category, title, curves; beside them one of the answers found, by task."""

RESULTS = ("train/loss", "evaluation_before/last_quarter_loss", "evaluation_after/last_quarter_loss", "train/mfu")
"""Curves whose last value stands beside the settings on the HParams page."""


def described(tag: str) -> str:
    """What a curve shows; empty where that is not known."""
    if found := re.fullmatch(accuracy_tag(r"(\w+)"), tag):
        return f"{found[1]}: share of answers that greedy decoding would write, mean over lengths and depths."
    curve, _, window = tag.partition(BY_WINDOW)
    text = DESCRIPTIONS.get(curve, "")
    return f"{text} Sequences of {int(window):,} tokens." if text and window else text


def accuracy_tag(task: str) -> str:
    """The curve of a task's answers."""
    return f"evaluation/{task}_accuracy"


def cards_of(tasks: Sequence[str]) -> dict[str, Mapping[str, tuple[str, ...]]]:
    """The cards of a run that asks these."""
    answers = {"answers": {"answers found, share": tuple(map(accuracy_tag, tasks))}}
    return {**CARDS, **(answers if tasks else {})}
