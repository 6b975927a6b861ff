"""A gradient that is not finite is found, with the rank that made it, before gradients are mixed over ranks.

After the reduction a single NaN is everywhere, and on CUDA the reduction of a bucket begins while the backward pass
goes on. So each rank sums a bucket of its own gradients at the moment when that bucket is handed over, wherever in the
step that is; the sum stays on the device until somebody asks. One pass over memory, no collective and no wait while
all is well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megalong.config.schema import TrainConfig
from megalong.runtime.console import warn
from megalong.runtime.errors import UserError
from megalong.training.agreement import Agreement
from megalong.training.steps import Done


class NonFiniteError(UserError):
    """A loss or gradient is not finite and the policy is to stop; the text names step, ranks and samples."""


ADVICE = (
    "The last checkpoint is as good as the steps before it: look at the named samples, lower train.lr, or check the "
    "weights that the stage started from."
)


class FiniteSteps:
    """Says which steps are left out, and ends the run where it must (a `Watcher`).

    Args:
        settings: `non_finite` and `max_skipped`.
        skipped: steps left out so far.
    """

    prefix = "finite"

    def __init__(self, settings: TrainConfig, watch: GradientWatch, skipped: int) -> None:
        self.settings, self.watch, self.skipped, self.in_a_row = settings, watch, skipped, 0

    def look(self, done: Done, word: Agreement) -> dict[str, float]:
        """Judge a step.

        Raises:
            NonFiniteError: it was left out and `train.non_finite=stop`, or too many were.
        """
        if done.result.updated:
            self.in_a_row = 0
            return {}
        ranks = ", ".join(map(str, self.watch.culprits())) or "(none alone)"
        what = (
            f"step {done.step}: loss {done.result.loss}, gradient norm {done.result.grad_norm}; not finite on rank "
            f"{ranks}. {done.samples()}"
        )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.settings.non_finite == "stop":
            raise NonFiniteError(f"{what} Nothing of this step was kept; the last checkpoint is good.")
        if self.in_a_row >= self.settings.max_skipped:
            raise NonFiniteError(f"{what} It is the {self.in_a_row}. step in a row (train.max_skipped). {ADVICE}")
        warn(f"{what} The step is left out ({self.skipped} so far).")
        return {}


class GradientWatch:
    """Wraps the reduction of every bucket, and the model's `finalize_model_grads_func`, which ends a step.

    Args:
        model: this rank's chunks.
    """

    def __init__(self, model: list[DistributedDataParallel]) -> None:
        self._sum: Tensor | None = None
        self._last: Tensor | None = None
        for chunk in model:
            for group in chunk.bucket_groups:
                group.start_grad_sync = self._noting(group)
        config = model[0].config
        finalize = config.finalize_model_grads_func

        def closing(*args: Any, **kwargs: Any) -> Any:
            done = finalize(*args, **kwargs)
            self._last, self._sum = self._sum, None
            return done

        config.finalize_model_grads_func = closing

    def _noting(self, group: Any) -> Callable[..., None]:
        start = group.start_grad_sync

        def noting(*args: Any, **kwargs: Any) -> None:
            if group.grad_reduce_handle is None:  # else it is under way, and megatron starts nothing
                for bucket in group.buckets:
                    here = bucket.grad_data.sum()
                    self._sum = here if self._sum is None else self._sum + here
            start(*args, **kwargs)

        return noting

    def culprits(self) -> list[int]:
        """Ranks whose own gradients were not finite in the last step; every rank calls this."""
        finite = self._last is None or bool(torch.isfinite(self._last))
        flags: list[bool] = [True] * dist.get_world_size()
        dist.all_gather_object(flags, finite)
        return [rank for rank, finite in enumerate(flags) if not finite]
