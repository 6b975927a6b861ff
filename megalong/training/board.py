"""What does TensorBoard show of a run? Curves by step and by tokens, each described, its settings, cards and pictures.

Curves by tokens lie in a folder of their own (TensorBoard: a run `<run>/tokens`). Their step is the tokens read by this
stage and all before it, so those of four stages make one line; and a resume purges a folder from a step on, which would
be all of them beside curves whose step is the optimizer's.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from dataclasses import replace

from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
from tensorboard.plugins.hparams import metadata as hparams

from megalong.evaluation.results import Moment, StageEvaluation, WindowEvaluation
from megalong.recipe.compose import to_yaml
from megalong.run import Run
from megalong.runtime.console import warn
from megalong.training.curves import DESCRIPTIONS, RESULTS, cards_of, described
from megalong.training.records import EventFile


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
