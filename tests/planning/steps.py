"""Runs real training steps on pool ranks and reports what they moved and what they hold."""

from __future__ import annotations

from dataclasses import dataclass

from megalong.doctor.steps import Trainer, measure_memory, tensor_bytes

__all__ = ["Observed", "measure_memory", "observe"]


@dataclass
class Observed:
    """What one rank saw."""

    sent: dict[tuple[str, str], int]
    """Bytes by (group, kind) of one step."""
    weights: int
    """Bytes of the buffer that holds the parameters."""
    gradients: int
    """Bytes of the main gradients."""
    optimizer: int
    """Bytes of master weights and moments."""
    parameters: dict[str, tuple[int, ...]]
    """Name to shape."""


def observe(overrides: list[str]) -> Observed:
    """One counted step after a warm-up step."""
    from megalong.training.beside import TrafficCounter

    trainer = Trainer(overrides)
    trainer.step()
    with TrafficCounter(trainer.layout) as counter:
        trainer.step()
    buffers = trainer.model[0].buffers
    return Observed(
        sent=dict(counter.sent),
        weights=sum(tensor_bytes(b.param_data) for b in buffers),
        gradients=sum(tensor_bytes(b.grad_data) for b in buffers),
        optimizer=trainer.optimizer_bytes(),
        parameters={
            name.removeprefix("module.").removeprefix("module."): tuple(p.shape)
            for name, p in trainer.model[0].named_parameters()
        },
    )
