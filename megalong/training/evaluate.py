"""Loss by position bucket on held-out sequences, at the start and at the end of a stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megalong.attention.zigzag import local_positions
from megalong.data.loader import evaluation_batches
from megalong.data.windows import Part, Windows
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums
from megalong.evaluation.results import StageEvaluation, WindowEvaluation
from megalong.run import Run
from megalong.runtime import device
from megalong.runtime.console import say, warn
from megalong.runtime.watchdog import enter
from megalong.training.forward import losses_of
from megalong.training.metrics import Metrics
from megalong.training.state import State


def evaluate_stage(
    run: Run, state: State, held_out: Windows | None, when: Literal["before", "after"], metrics: Metrics
) -> None:
    """Evaluate unless that has been done; the result goes into the state, evaluation.json and TensorBoard."""
    found = state.evaluation
    if found is not None and found.after is not None and when == "before":  # a finished stage is made longer
        _keep(run, state, replace(found, after=None, shorter=[replace(w, after=None) for w in found.shorter]))
    if held_out is None or (found is not None and (when == "before" or found.after is not None)):
        return
    enter("evaluating")
    here = {part.window: evaluate(run, state.model, part) for part in held_out.parts}
    _keep(run, state, _noted(found, here))
    assert state.evaluation is not None
    metrics.evaluated(state.evaluation, state.step, state.cursor.consumed_samples * run.seq_length)
    for window, curve in here.items():
        loss = "has no token that counts" if curve.last_quarter is None else f"{curve.last_quarter:.4f}"
        which = "the window" if window == run.seq_length else f"{window:,} tokens"
        say(f"{when} the stage: loss on the last quarter of {which} {loss}")


def _noted(found: StageEvaluation | None, here: dict[int, LossByPosition]) -> StageEvaluation:
    """What is known once the windows of `here`, the stage's own first, have been evaluated."""
    (window, main), *others = here.items()
    if found is None:
        return StageEvaluation(window, main, None, [WindowEvaluation(w, curve, None) for w, curve in others])
    shorter = [replace(w, after=here.get(w.seq_length)) for w in found.shorter]
    return replace(found, after=main, shorter=shorter)


def _keep(run: Run, state: State, evaluation: StageEvaluation) -> None:
    state.evaluation = evaluation
    try:
        if dist.get_rank() == 0:
            evaluation.write(run.run_dir)
    except OSError as error:  # it is in the checkpoint too
        warn(f"evaluation.json cannot be written in {run.run_dir}: {error.strerror or error}.")


def evaluate(run: Run, model: list[DistributedDataParallel], part: Part) -> LossByPosition:
    """Mean loss per position bucket of the part's window; every rank calls this and gets the same."""
    layout, samples = run.layout, run.config.data.eval_sequences
    cp_rank = parallel_state.get_context_parallel_rank()
    edges = bucket_edges(part.window)
    positions = local_positions(run.seq_length, layout.cp, cp_rank).to(device.device()) % part.window

    def reduce(losses_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return bucket_sums(losses_BS, mask_BS, positions, edges)

    batches = evaluation_batches(
        part,
        samples=samples,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=layout.dp,
        cp_rank=cp_rank,
        cp_size=layout.cp,
        document_mask=run.config.attention.document_mask,
    )
    rounds = -(-min(samples * part.rows, len(part.dataset)) // (part.rows * layout.dp))
    sums = losses_of(run.seq_length, model, batches, rounds, reduce, (2, len(edges) - 1))
    return LossByPosition.from_sums(sums.cpu(), edges)
