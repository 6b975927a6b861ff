"""Which rank made a gradient that is not finite? Noted before gradients are mixed over ranks.

After the reduction a single NaN is everywhere. Each rank therefore sums its own gradient buffers once a step, just
before `finalize_model_grads`; one pass over memory, no collective while all is well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from megalong.runtime.errors import UserError


class NonFiniteError(UserError):
    """A loss or gradient is not finite and the policy is to stop; the text names step, ranks and samples."""


class GradientWatch:
    """Wraps the model's `finalize_model_grads_func`.

    Args:
        model: this rank's chunks.
    """

    def __init__(self, model: list[DistributedDataParallel]) -> None:
        self.local_finite = True
        config = model[0].config
        finalize = config.finalize_model_grads_func

        def checked(chunks: list[Any], *args: Any, **kwargs: Any) -> Any:
            sums = [buffer.grad_data.sum() for chunk in chunks for buffer in chunk.buffers]
            self.local_finite = bool(torch.isfinite(torch.stack(sums)).all())
            return finalize(chunks, *args, **kwargs)

        config.finalize_model_grads_func = checked

    def culprits(self) -> list[int]:
        """Ranks whose own gradients were not finite in the last step; every rank calls this."""
        flags: list[bool] = [True] * dist.get_world_size()
        dist.all_gather_object(flags, self.local_finite)
        return [rank for rank, finite in enumerate(flags) if not finite]
