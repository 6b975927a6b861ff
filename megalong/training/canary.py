"""The check before the first step that information crosses the context-parallel group, in the model as it is built."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megalong.attention import canary
from megalong.model.gpt import attention_of
from megalong.runtime import device


def run_canary(model: list[DistributedDataParallel]) -> bool:
    """Run it where it can look; every rank calls this.

    Returns:
        whether it could: it cannot look into the attention of Transformer Engine.

    Raises:
        CanaryError: information does not cross the context-parallel group as it must.
    """
    core = attention_of(model)
    if core is not None:
        canary.check(core, parallel_state.get_context_parallel_rank(), device.device())
    return core is not None
