"""Tiles that a CUDA kernel gets wrong never reach it: kernels made of kernels, which look at shapes only.

Which faults, and where they were reported:

- cuDNN's backward gives NaN in dQ where keys % 128 == 64 and the final log-sum-exp is below -88.7 (pytorch #196678,
  cudnn-frontend #628; torch 2.13 ships cuDNN 9.20, mended in 9.26). A ring gives it just that: the final log-sum-exp
  of a row against one tile. It gives NaN at a single query row (cudnn-frontend #1072) and crashes where batch, heads
  and rows are 1 (#1071).
- cuDNN makes a plan for each shape and keeps it for good (pytorch #190388); documents bring new shapes with each batch.
- flash attention addresses its fp32 dQ, and dK and dV of each query head, with 32 bits (flash-attention #767).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megalong.attention.kernel import Attended, CuSeqlens, Grads, Kernel
from megalong.attention.merge import accumulation_dtype

ALIGNMENT = 128
"""Rows and keys of every tile that cuDNN is given are multiples of this."""
ADDRESSABLE = 2**31
"""Elements of one tensor that 32 signed bits address."""
ROW_PADDING = 128
"""Rows to which flash attention rounds up its fp32 dQ, once for each document."""


class RegularTiles:
    """Tiles between whole chunks of the zigzag to one kernel, all others to another.

    Without document boundaries all tiles are regular, and there are only a few shapes of them.

    Args:
        fast: is given tiles whose rows and keys are multiples of `chunk`, where `chunk` is one of `ALIGNMENT`.
        sound: is given all others, and runs of documents.
        chunk: tokens of one zigzag chunk, half of those of a context-parallel rank.
    """

    def __init__(self, fast: Kernel, sound: Kernel, chunk: int) -> None:
        self.fast, self.sound, self.chunk = fast, sound, chunk
        self.name, self.varlen = fast.name, sound.varlen

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._of(q, k, cu_seqlens).forward(q, k, v, causal, cu_seqlens)

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        return self._of(attended.q, attended.k, cu_seqlens).backward(dout, attended, causal, cu_seqlens)

    def _of(self, q: torch.Tensor, k: torch.Tensor, cu_seqlens: CuSeqlens) -> Kernel:
        aligned = self.chunk > 0 and self.chunk % ALIGNMENT == 0
        whole = aligned and q.shape[2] % self.chunk == 0 and k.shape[2] % self.chunk == 0
        return self.fast if whole and cu_seqlens is None else self.sound


class Addressable:
    """Calls whose tensors need more than 32 bits to address are cut along the heads, which do not know each other.

    Args:
        kernel: is given calls with fewer than `limit` elements in each tensor, of the fp32 dQ and of dK and dV of
            every query head too.
        limit: elements.
    """

    def __init__(self, kernel: Kernel, limit: int = ADDRESSABLE) -> None:
        self.kernel, self.limit = kernel, limit
        self.name, self.varlen = kernel.name, kernel.varlen

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts = list(self._parts(q, k, cu_seqlens))
        if len(parts) == 1:
            return self.kernel.forward(q, k, v, causal, cu_seqlens)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype), device=q.device)
        for h, g in parts:
            out[:, h], lse[:, h] = self.kernel.forward(q[:, h], k[:, g], v[:, g], causal, cu_seqlens)
        return out, lse

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        q, k, v, out, lse = attended
        parts = list(self._parts(q, k, cu_seqlens))
        if len(parts) == 1:
            return self.kernel.backward(dout, attended, causal, cu_seqlens)
        # heads of one group may be in several parts: their shares of dk and dv are added up
        wide = accumulation_dtype(k.dtype) if len(parts) > k.shape[1] else k.dtype
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for h, g in parts:
            part = Attended(q[:, h], k[:, g], v[:, g], out[:, h], lse[:, h])
            dq[:, h], dk_part, dv_part = self.kernel.backward(dout[:, h], part, causal, cu_seqlens)
            dk[:, g] += dk_part
            dv[:, g] += dv_part
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _parts(self, q: torch.Tensor, k: torch.Tensor, cu_seqlens: CuSeqlens) -> Iterator[tuple[slice, slice]]:
        """Query heads and key-value heads of each call: as many whole groups as fit, else a part of one group."""
        batch, heads, rows, channels = q.shape
        groups, per_group = k.shape[1], heads // k.shape[1]
        padded = rows + ROW_PADDING * max(1, len(cu_seqlens or ()) - 1)
        fit = max(1, (self.limit - 1) // (batch * max(padded, k.shape[2]) * channels))
        if fit >= per_group:
            step = fit // per_group
            for g in range(0, groups, step):
                stop = min(groups, g + step)
                yield slice(g * per_group, stop * per_group), slice(g, stop)
        else:
            for g in range(groups):
                for h in range(0, per_group, fit):
                    first = g * per_group
                    yield slice(first + h, first + min(per_group, h + fit)), slice(g, g + 1)
