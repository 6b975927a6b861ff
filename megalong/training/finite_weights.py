"""Are the weights, and the optimizer's masters and moments, that a rank has loaded numbers? Else nothing is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megalong.checkpoint.optimizer_shards import part_of, spreads
from megalong.config.schema import ModelConfig
from megalong.convert.parameters import parameters_of
from megalong.runtime.errors import CheckpointError
from megalong.runtime.launch import together


def require_finite(
    where: Path, model: list[DistributedDataParallel], shape: ModelConfig, optimizer: MegatronOptimizer | None = None
) -> None:
    """Refuse weights, and with `optimizer` master weights and moments, that are not finite. Every rank calls this.

    Raises:
        CheckpointError: it names the first such tensor and its rank.
    """

    def check() -> None:
        for name, tensor in _loaded(model, shape, optimizer):
            if tensor.numel() and not all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor)).tolist()):
                raise CheckpointError(
                    f"{where}: {name} holds values that are not finite ({tensor.dtype}). Training on them would give "
                    "nothing but such values: start from an undamaged checkpoint."
                )

    together(check)


def _loaded(
    model: list[DistributedDataParallel], shape: ModelConfig, optimizer: MegatronOptimizer | None
) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of all that this rank has loaded."""
    names = {}
    for _, parameter, entry in parameters_of(model[0], shape):
        names[parameter] = entry.parameter
        yield f"weight {entry.parameter}", parameter
    if optimizer is None:
        return
    part = part_of(optimizer)
    for spread in spreads(part):
        if spread.of(part.data_parallel_group.rank()) is not None:
            for key, tensor in part._get_main_param_and_optimizer_states(spread.parameter).items():
                yield f"{key} of {names[spread.parameter]} in the optimizer", tensor
