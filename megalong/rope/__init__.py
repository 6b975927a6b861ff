"""Rotary embeddings: which base a window needs, and which frequencies follow from it."""

from megalong.rope.frequencies import check_scaling, rope_type, rotary_frequencies
from megalong.rope.theta import RotaryPoint, check_follows, dynamic_ntk, scaling_law, stage_theta

__all__ = [
    "RotaryPoint",
    "check_follows",
    "check_scaling",
    "dynamic_ntk",
    "rope_type",
    "rotary_frequencies",
    "scaling_law",
    "stage_theta",
]
