"""apex/normalization/fused_layer_norm.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedRMSNorm(nn.Module):
    """What apex computes on a CPU: the weight is multiplied in its own dtype."""

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        assert elementwise_affine
        self.eps, self.weight = eps, nn.Parameter(torch.ones(normalized_shape))

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] -> the same."""
        wide = input.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(self.weight.dtype)
