"""How many bytes of weights, gradients and optimizer state does one rank keep from the first step to the last?"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.planning.parameters import buffer_of, default_bucket_size, rank_parameters
from megalong.planning.workload import Workload
from megalong.topology.layout import Coordinates

MAIN_GRADIENT_BYTES = 4  # gradients are accumulated and reduced in fp32


@dataclass(frozen=True)
class StaticBytes:
    """What a rank keeps all the time, bytes."""

    weights: int
    """Parameters in the model's dtype, with the padding of megatron's buffer."""
    gradients: int
    """fp32 main gradients, padded alike."""
    optimizer: int
    """This rank's shard of fp32 master weights (bf16 runs only) and the two moments."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def static_bytes(work: Workload, at: Coordinates) -> StaticBytes:
    """Exactly what megatron's buffers and distributed optimizer hold on the rank at `at`."""
    layout = work.layout
    group = layout.dp * layout.cp
    parameters = rank_parameters(work.model, layout.tp, layout.pp, at.pp)
    buffer = buffer_of(parameters, group, default_bucket_size(group, at.pp, work.overlap_gradients))
    # fp32 runs update the parameters themselves: a shard of them is a view and costs nothing
    per_element = 12 if work.precision == "bf16" else 8
    return StaticBytes(
        weights=buffer.numel * work.element_bytes,
        gradients=buffer.numel * MAIN_GRADIENT_BYTES,
        optimizer=buffer.shard_elements(at.dp * layout.cp + at.cp) * per_element,
    )
