"""What does TensorBoard show of a run? Curves by step and by tokens, each described, its settings, cards and pictures.

Curves by tokens lie in a folder of their own (TensorBoard: a run `<run>/tokens`). Their step is the tokens read by this
stage and all before it, so those of four stages make one line; and a resume purges a folder from a step on, which would
be all of them beside curves whose step is the optimizer's.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams

from megalong.evaluation.results import Moment, StageEvaluation, WindowEvaluation
from megalong.recipe.compose import to_yaml
from megalong.run import Run
from megalong.runtime.console import warn
from megalong.training.phases import PHASES
from megalong.training.records import EventFile

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


class Board:
    """Writes the event files of one attempt; `flush` is the only write to the disk.

    Args:
        step: steps already done.
        tokens: read so far by this stage and those before it.
    """

    def __init__(self, run: Run, step: int, tokens: int) -> None:
        folder = run.run_dir / "tensorboard"
        self._by_step, self._by_tokens = EventFile(folder, step + 1), EventFile(folder / "tokens", tokens + 1)
        self._by_step.add_text("config", f"```yaml\n{to_yaml(run.config)}```", step, "Every setting of this attempt.")
        cards = _layout(cards_of(run.config.evaluation.tasks)).SerializeToString()
        about = custom_scalar.create_summary_metadata()
        self._by_step.add_tensor(custom_scalar.CONFIG_SUMMARY_TAG, cards, step, about)
        metrics = [summary_v2.Metric(tag) for tag in RESULTS]
        values = hyperparameters(run)
        self._by_step.add(summary_v2.hparams_config_pb([summary_v2.HParam(name) for name in values], metrics), step)
        self._by_step.add(summary_v2.hparams_pb(values, trial_id=str(run.run_dir)), step)

    def add(self, tag: str, value: float, step: int) -> None:
        """A point of a curve by step."""
        self._by_step.add_scalar(tag, value, step, described(tag))

    def add_by_tokens(self, values: Mapping[str, float], tokens: int) -> None:
        """Points of curves by tokens."""
        for name, value in values.items():
            tag = f"by_tokens/{name}"
            self._by_tokens.add_scalar(tag, value, tokens, DESCRIPTIONS.get(tag, ""))

    def add_evaluation(self, run: Run, found: StageEvaluation, moment: Moment, when: str) -> None:
        """Pictures of an evaluation beside that before the stage: loss by position, heat maps of questions."""
        from megalong.evaluation.heatmap import draw  # matplotlib: only the first rank draws
        from megalong.evaluation.plots import plot_loss_by_position

        step = moment.step
        windows = [WindowEvaluation(found.seq_length, found.before, None), *found.shorter]
        panels = {
            f"{run.config.stage.name}: {w.seq_length:,} tokens": replace(w, after=None if when == "before" else curve)
            for w, curve in zip(windows, (moment.position, *moment.shorter), strict=True)
        }
        then = moment.asked.named(f"after step {step} of {run.steps}", run.seq_length, run.theta)
        before = [] if when == "before" or found.asked_before is None else [found.asked_before]
        columns = [*(a.named("before the stage", run.seq_length, run.theta) for a in before), then]
        file = io.BytesIO()
        try:
            plot_loss_by_position(panels, file, f"after step {step} of {run.steps}")
            about = "Held-out loss against position in the window, before the stage and, once it is done, after it."
            self._by_step.add_png("evaluation/loss_by_position", file.getvalue(), step, about)
            for task in dict.fromkeys(c.task for c in then.cells if c.depth is not None):
                shown = [e for e in columns if any(c.task == task for c in e.cells)]
                about = f"{task}: share of answers found, by the depth at which they stand and the question's length."
                self._by_step.add_png(f"evaluation/{task}", draw(shown, task), step, about)
        except OSError as error:  # matplotlib keeps its list of fonts on the disk
            warn(f"the evaluation is not drawn for TensorBoard: {error.strerror or error}")

    def finished(self, step: int) -> None:
        """Mark the run as done on the HParams page."""
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        about = hparams.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        self._by_step.add_tensor(hparams.SESSION_END_INFO_TAG, hparams.NULL_TENSOR, step, about)

    def flush(self) -> None:
        """Write what was added."""
        self._by_step.flush()
        self._by_tokens.flush()

    def close(self) -> None:
        """Write what waits, if that is possible by now."""
        self._by_step.close()
        self._by_tokens.close()


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


def hyperparameters(run: Run) -> dict[str, str | int | float | bool]:
    """What tells one run from another: what decides what is trained, and the layout."""
    config, optimizer = run.config, run.config.optimizer
    return {
        "stage": config.stage.name,
        "scale": config.scale.name,
        "model": config.model.name,
        "window": run.seq_length,
        "theta": run.theta,
        "steps": run.steps,
        "global_batch_size": run.global_batch_size,
        "lr": run.lr,
        "decay": optimizer.decay,
        "min_lr": optimizer.min_lr,
        "warmup_steps": optimizer.warmup_steps,
        "adam_beta1": optimizer.adam_beta1,
        "adam_beta2": optimizer.adam_beta2,
        "weight_decay": optimizer.weight_decay,
        "clip_grad": optimizer.clip_grad,
        "precision": config.precision,
        "document_mask": config.attention.document_mask,
        "cp_comm_type": config.attention.cp_comm_type,
        "tp": run.layout.tp,
        "cp": run.layout.cp,
        "pp": run.layout.pp,
        "dp": run.layout.dp,
        "seed": config.seed,
    }


def _layout(cards: Mapping[str, Mapping[str, tuple[str, ...]]]) -> layout_pb2.Layout:
    def chart(title: str, tags: tuple[str, ...]) -> layout_pb2.Chart:
        exactly = [f"^{re.escape(tag)}$" for tag in tags]
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=exactly))

    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[chart(name, tags) for name, tags in charts.items()])
            for title, charts in cards.items()
        ]
    )
