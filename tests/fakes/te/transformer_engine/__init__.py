"""Transformer Engine, as far as megatron-core imports it."""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.18.0"
