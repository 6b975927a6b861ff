"""Which operator computes a tile on this device? PyTorch's own kernels for the CPU, a reference, and the choice.

CUDA kernels are in `kernels_cuda.py`, what keeps bad tiles from them in `guards.py`. The reference materialises the
scores and is for tests and small checks.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

from megalong.attention import kernels_cuda
from megalong.attention.guards import Addressable, RegularTiles
from megalong.attention.kernel import Attended, CuSeqlens, Grads, Kernel
from megalong.attention.merge import accumulation_dtype
from megalong.attention.requirements import KERNELS
from megalong.runtime import packages
from megalong.runtime.errors import ConfigError


class CpuFlash:
    """PyTorch's CPU flash attention (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): fp32, fp64, bf16, fp16."""

    name = "cpu_flash"
    varlen = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert cu_seqlens is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=self.scale)

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        assert cu_seqlens is None
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *attended, 0.0, causal, scale=self.scale
        )


class Reference:
    """Attention by its definition, in the accumulation dtype, with all scores in memory. Any device."""

    name = "reference"
    varlen = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores, v_ = self._scores(q, k, causal, cu_seqlens), v.to(accumulation_dtype(v.dtype)).unsqueeze(2)
        lse = torch.logsumexp(scores, -1)
        out = torch.exp(scores - lse.unsqueeze(-1)) @ v_
        return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        q, k, v, out, lse = attended
        groups, wide = k.shape[1], accumulation_dtype(q.dtype)
        q_, dout_, out_ = (x.to(wide).unflatten(1, (groups, -1)) for x in (q, dout, out))
        k_, v_ = (x.to(wide).unsqueeze(2) for x in (k, v))
        p = torch.exp(self._scores(q, k, causal, cu_seqlens) - lse.to(wide).unflatten(1, (groups, -1)).unsqueeze(-1))
        dp = dout_ @ v_.transpose(-1, -2)
        ds = p * (dp - (dout_ * out_).sum(-1, keepdim=True)) * self.scale
        dq = (ds @ k_).flatten(1, 2)
        dk = (ds.transpose(-1, -2) @ q_).sum(2)
        dv = (p.transpose(-1, -2) @ dout_).sum(2)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: torch.Tensor, k: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens) -> torch.Tensor:
        """Scaled scores [B, K, H/K, Sq, Sk], -inf where a query may not look."""
        wide = accumulation_dtype(q.dtype)
        scores = q.to(wide).unflatten(1, (k.shape[1], -1)) @ k.to(wide).unsqueeze(2).transpose(-1, -2) * self.scale
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
            for a, b in pairwise(cu_seqlens or (0, q.shape[2])):
                hidden[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores


def fastest(capability: tuple[int, int], head_dim: int, deterministic: bool) -> str:
    """The CUDA kernel that `attention.kernel=auto` takes on a device of this compute capability.

    On 9.0 cuDNN is 1.7 to 2.3 times as fast as flash attention 2, on 8.9 alike, on 8.0 and 8.6 slower (transformers
    #48163, flash-attention #1893). Its backward is not deterministic in torch (pytorch #182551), flash attention's is
    where torch is told to be.
    """
    fits = head_dim <= kernels_cuda.CudnnFlash.max_head_dim
    return "cudnn" if capability[0] == 9 and fits and not deterministic else "cuda_flash"


def select(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    scale: float,
    tokens: int = 0,
    capability: tuple[int, int] | None = None,
) -> Kernel:
    """The kernel called `name` in the configuration; `auto` chooses by device, dtype and head dim.

    Args:
        scale: factor of the scores, usually head_dim ** -0.5.
        tokens: of one sequence on a context-parallel rank, by which tiles are told regular; 0: none is.
        capability: compute capability of the CUDA device; None: as torch reports it.

    Raises:
        ConfigError: the name is unknown, or that kernel cannot run these tensors.
    """
    if name not in KERNELS:
        raise ConfigError(f"attention.kernel={name} is unknown: choose one of {', '.join(KERNELS)}.")
    if name == "auto" and device.type != "cuda":
        name = "cpu_flash"
    if name == "reference":
        return Reference(scale)
    if name == "cpu_flash":
        if device.type != "cpu":
            raise ConfigError(f"attention.kernel=cpu_flash cannot run on {device.type}: use auto, cuda_flash or cudnn.")
        return CpuFlash(scale)
    if device.type != "cuda":
        raise ConfigError(f"attention.kernel={name} needs a CUDA device, here is {device.type}: use auto or cpu_flash.")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ConfigError(
            f"attention.kernel={name} on CUDA computes in bf16 or fp16, not in {dtype}: set precision=bf16 "
            "(attention.kernel=reference runs any dtype, but only for short windows)."
        )
    if name == "auto":
        capability = capability or torch.cuda.get_device_capability(device)
        name = fastest(capability, head_dim, torch.are_deterministic_algorithms_enabled())
    if name == "cudnn" and torch.are_deterministic_algorithms_enabled():
        raise ConfigError(
            "attention.kernel=cudnn has no deterministic backward in torch: use attention.kernel=auto, which takes "
            "cuda_flash where torch is told to be deterministic."
        )
    kernel = _CUDA[name](scale)
    if head_dim % 8 or head_dim > kernel.max_head_dim:
        raise ConfigError(
            f"attention.kernel={kernel.name} needs a head dim that is a multiple of 8 and at most "
            f"{kernel.max_head_dim}, not {head_dim}."
        )
    if name == "fa3":
        _check_fa3(capability or torch.cuda.get_device_capability(device))
    kernels_cuda.install_flash("FA3" if name == "fa3" else None)
    if name != "cudnn":
        return Addressable(kernel)
    return RegularTiles(Addressable(kernel), Addressable(kernels_cuda.CudaFlash(scale)), tokens // 2)


_CUDA: dict[str, type[kernels_cuda.CudaFlash] | type[kernels_cuda.CudnnFlash]] = {
    "cuda_flash": kernels_cuda.CudaFlash,
    "cudnn": kernels_cuda.CudnnFlash,
    "fa3": kernels_cuda.FlashAttention3,
}


@functools.cache  # asked for in every layer
def _check_fa3(capability: tuple[int, int]) -> None:
    if capability != (9, 0):
        raise ConfigError(
            "attention.kernel=fa3 needs compute capability 9.0 (H100, H200, GH200), here is "
            f"{capability[0]}.{capability[1]}: use attention.kernel=auto."
        )
    packages.require(packages.FA3, "attention.kernel=fa3", "attention.kernel=auto")


def on_this_gpu() -> list[str]:
    """The kernels among which a measurement chooses on this process's GPU."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return ["cuda_flash", "cudnn", *(["fa3"] if hopper and packages.FA3.is_here else [])]


def with_measured(kernel: str, measured: str, deterministic: bool) -> str:
    """The setting `attention.kernel`, or where that is auto what was measured to be fastest on such machines.

    Args:
        measured: `cluster.attention_kernel`.
    """
    missing = measured == "fa3" and not packages.FA3.is_here
    return kernel if kernel != "auto" or deterministic or missing else measured
