"""Which CUDA operators compute a tile? PyTorch's bundled flash attention 2, and cuDNN's fused attention.

Both take [B, H, S, D] views with any strides, keep H and K apart (GQA), and let their backward be given the final
output and log-sum-exp. Causal tiles are square, so how an operator aligns a causal rectangle never matters.
Schemas: aten/src/ATen/native/native_functions.yaml; the order of arguments follows
torch/distributed/tensor/experimental/_context_parallel/_attention.py and torch/nn/attention/varlen.py.
"""

from __future__ import annotations

import torch

from megalong.attention.kernels import Grads

aten = torch.ops.aten


class CudaFlash:
    """`aten._flash_attention_forward` / `_backward` on dense [B, S, H, D]: bf16 and fp16."""

    name = "cuda_flash"
    max_head_dim = 256

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        out, lse, *_ = aten._flash_attention_forward(
            q_, k_, v_, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=self.scale
        )
        return out.transpose(1, 2), lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
    ) -> Grads:
        dout_, q_, k_, v_, out_ = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        seed, offset = _no_dropout(q.device)
        dq, dk, dv = aten._flash_attention_backward(
            dout_, q_, k_, v_, out_, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset,
            scale=self.scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudnnFlash:
    """`aten._scaled_dot_product_cudnn_attention` and its backward: bf16 and fp16."""

    name = "cudnn"
    max_head_dim = 128

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=self.scale
        )
        return out, lse.reshape(q.shape[:-1])  # cuDNN's statistics tensor is [B, H, S, 1]

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
    ) -> Grads:
        seed, offset = _no_dropout(q.device)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), seed, offset, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=self.scale,
        )  # fmt: skip


def _no_dropout(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random state that a backward asks for and, without dropout, does not read."""
    return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
