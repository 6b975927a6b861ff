"""RMSNorm that works on any device and with sequence parallelism, and apex's fused one where it is chosen.

megatron-core's own torch norm refuses sequence parallelism, and of apex it takes the LayerNorm alone.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megalong.model.elementwise import FusedRMSNorm, rms_norm
from megalong.runtime import device, fused, packages


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in fp32 (Zhang & Sennrich, arXiv 1910.07467).

    Constructor arguments are those with which megatron-core builds a norm from a layer spec.

    Args:
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each tensor-parallel rank norms its own slice of the sequence, so megatron sums this gradient over the
        # tensor-parallel group (distributed/finalize_model_grads.py looks for the attribute).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> same shape and dtype."""
        norm = FusedRMSNorm.apply if fused.in_use() else rms_norm
        return norm(x, self.weight, self.eps)


class ApexRMSNorm:
    """apex's fused RMSNorm (apex/normalization/fused_layer_norm.py), built as megatron-core builds a norm."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> nn.Module:  # type: ignore[misc]
        from apex import normalization

        norm: nn.Module = normalization.FusedRMSNorm(hidden_size, eps=eps).to(config.params_dtype)
        norm.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]
        return norm


def norm_class(wanted: str) -> type:
    """The class of a model's norms.

    Args:
        wanted: `train.norm`.

    Raises:
        ConfigError: apex was chosen and is not installed.
    """
    if wanted == "apex":
        packages.require(packages.APEX_NORM, "train.norm=apex", "train.norm=auto")
    return ApexRMSNorm if packages.norm(wanted, device.on_cuda()) == "apex" else RMSNorm
