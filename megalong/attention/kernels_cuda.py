"""Which CUDA operators compute a tile? PyTorch's flash attention (2, which it brings, or 3), and cuDNN's attention.

Both take views with any strides, keep H and K apart (GQA), and let their backward be given the final output and
log-sum-exp. Causal tiles are square, so how an operator aligns a causal rectangle never matters.

Shapes and argument orders were read in torch 2.13's aten/src/ATen/native/native_functions.yaml,
torch/_meta_registrations.py and torch/nn/attention/varlen.py: flash works on [B, S, H, D] and returns lse
[B, H, S]; its variable-length form works on [S, H, D] and returns lse [H, S]; cuDNN works on [B, H, S, D] and returns
lse [B, H, S, 1] (since torch 2.9). Both want lse contiguous backward, which a slice of rows is not. FlashAttention 3
is put behind flash's operators, for the whole process (torch/nn/attention/_fa3.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import attention

from megalong.attention.kernel import Attended, CuSeqlens, Grads

aten = torch.ops.aten


class CudaFlash:
    """`aten._flash_attention_forward` and `_backward`: bf16 and fp16, and many documents in one call."""

    name = "cuda_flash"
    varlen = True
    max_head_dim = 256

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        if cu_seqlens is None:
            out, lse, *_ = aten._flash_attention_forward(
                q_, k_, v_, None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=self.scale
            )
            return out.transpose(1, 2), lse
        rows, longest = _rows(cu_seqlens, q.device)
        parts = [
            aten._flash_attention_forward(
                q_[b], k_[b], v_[b], rows, rows, longest, longest, 0.0, causal, False, scale=self.scale
            )[:2]
            for b in range(q.shape[0])
        ]
        return _batch([p[0] for p in parts]).transpose(1, 2), _batch([p[1] for p in parts])

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        q, k, v, out, lse = attended
        dout_, q_, k_, v_, out_ = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        lse = lse.contiguous()
        seed, unused = _no_dropout(q.device, torch.uint64)
        if cu_seqlens is None:
            dq, dk, dv = aten._flash_attention_backward(
                dout_, q_, k_, v_, out_, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, unused,
                scale=self.scale,
            )  # fmt: skip
        else:
            rows, longest = _rows(cu_seqlens, q.device)
            parts = [
                aten._flash_attention_backward(
                    dout_[b], q_[b], k_[b], v_[b], out_[b], lse[b], rows, rows, longest, longest, 0.0, causal, seed,
                    unused, scale=self.scale,
                )
                for b in range(q.shape[0])
            ]  # fmt: skip
            dq, dk, dv = (_batch(x) for x in zip(*parts, strict=True))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class FlashAttention3(CudaFlash):
    """The same operators, computed by the package `flash_attn_interface`: compute capability 9.0, bf16 and fp16."""

    name = "fa3"


def install_flash(implementation: str | None) -> None:
    """What torch's flash operators call from now on: "FA3", or the one that torch brings."""
    if attention.current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(implementation)


class CudnnFlash:
    """`aten._scaled_dot_product_cudnn_attention` and its backward: bf16 and fp16."""

    name = "cudnn"
    varlen = False  # torch's variable-length cuDNN path refuses GQA
    max_head_dim = 128

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cu_seqlens is None
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=self.scale
        )
        return out, lse.reshape(q.shape[:-1])

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        assert cu_seqlens is None
        q, k, v, out, lse = attended
        seed, offset = _no_dropout(q.device, torch.int64)
        return aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.contiguous().unsqueeze(-1), seed, offset, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal, scale=self.scale,
        )  # fmt: skip


# the same ones come back in every layer, forward and backward, for each micro-batch that a pipeline has in flight and
# each step of its ring; from pinned memory, so that the host does not wait for the device
@functools.lru_cache(maxsize=4096)
def _rows(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """(cumulative lengths, int32 on the device; longest square)."""
    rows = torch.tensor(cu_seqlens, dtype=torch.int32, pin_memory=device.type == "cuda")
    return rows.to(device, non_blocking=True), max(b - a for a, b in pairwise(cu_seqlens))


def _batch(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Results of single sequences as one batch; a batch of one is not copied."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def _no_dropout(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random state that a backward asks for and, without dropout, does not read."""
    return torch.zeros(2, dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device)
