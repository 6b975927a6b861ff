"""Random states of tensor-parallel ranks, and recompute under FP8, which is off."""

from __future__ import annotations

from typing import Any


class CudaRNGStatesTracker:
    """megatron-core derives a class from it."""


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Entered under FP8 alone."""
    raise AssertionError("FP8 was not asked for")
