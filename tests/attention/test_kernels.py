"""Kernels return the log-sum-exp and exact partial gradients; the choice of one is checked."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import _fa3

from megalong.attention import kernels, kernels_cuda
from megalong.attention.blocks import bhsd
from megalong.attention.kernel import Attended
from megalong.runtime.errors import ConfigError
from megalong.runtime.packages import Package
from tests.attention.reference import attention, inputs, relative_l2


@pytest.mark.parametrize("name", ["cpu_flash", "reference"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (4, 1, 128), (8, 2, 64)])
def test_a_causal_tile_is_attention_forward_and_backward(name: str, heads: int, kv_heads: int, head_dim: int) -> None:
    full = inputs(33, 2, heads, kv_heads, head_dim)
    kernel = kernels.select(name, torch.device("cpu"), torch.float64, head_dim, head_dim**-0.5)
    q, k, v, dout = map(bhsd, full)
    out, lse = kernel.forward(q, k, v, True)
    grads = kernel.backward(dout, Attended(q, k, v, out, lse), True)
    right = attention(*full, None)
    assert max(relative_l2(a, bhsd(b)) for a, b in zip((out, *grads), right, strict=True)) < 1e-14


def test_gradients_of_two_key_blocks_add_up_given_the_final_output() -> None:
    q, k, v, dout = map(bhsd, inputs(32, 1, 4, 2, 16))
    reference = kernels.Reference(0.25)
    out, lse = reference.forward(q, k, v, False)
    whole = reference.backward(dout, Attended(q, k, v, out, lse), False)
    for kernel in (reference, kernels.CpuFlash(0.25)):
        a, b = (
            kernel.backward(dout, Attended(q, k[:, :, s], v[:, :, s], out, lse), False)
            for s in (slice(9), slice(9, None))
        )
        torch.testing.assert_close(a[0] + b[0], whole[0])
        for i in (1, 2):
            torch.testing.assert_close(torch.cat((a[i], b[i]), 2), whole[i])


def test_cut_squares_are_documents() -> None:
    full = inputs(24, 2, 4, 2, 16)
    q, k, v, dout = map(bhsd, full)
    kernel = kernels.Reference(0.25)
    cu_seqlens = (0, 1, 9, 24)
    out, lse = kernel.forward(q, k, v, True, cu_seqlens)
    grads = kernel.backward(dout, Attended(q, k, v, out, lse), True, cu_seqlens)
    right = attention(*full, cu_seqlens[:-1])
    assert max(relative_l2(a, bhsd(b)) for a, b in zip((out, *grads), right, strict=True)) < 1e-14


def test_auto_is_flash_on_the_device() -> None:
    assert kernels.select("auto", torch.device("cpu"), torch.float32, 64, 1.0).name == "cpu_flash"
    assert (
        kernels.select("auto", torch.device("cuda"), torch.bfloat16, 128, 1.0, capability=(8, 9)).name == "cuda_flash"
    )
    assert kernels.select("cudnn", torch.device("cuda"), torch.bfloat16, 128, 1.0).name == "cudnn"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head_dim", "said"),
    [
        ("flash", "cpu", torch.float32, 64, "choose one of auto"),
        ("cuda_flash", "cpu", torch.bfloat16, 64, "needs a CUDA device"),
        ("cpu_flash", "cuda", torch.bfloat16, 64, "cannot run on cuda"),
        ("auto", "cuda", torch.float32, 64, "precision=bf16"),
        ("cudnn", "cuda", torch.bfloat16, 256, "at most 128"),
        ("cuda_flash", "cuda", torch.bfloat16, 100, "multiple of 8"),
        ("fa3", "cuda", torch.bfloat16, 128, "FlashAttention 3, which is not installed: build it from"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    name: str, device: str, dtype: torch.dtype, head_dim: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        kernels.select(name, torch.device(device), dtype, head_dim, 1.0, capability=(9, 0))


def test_what_was_measured_takes_the_place_of_auto() -> None:
    assert kernels.with_measured("auto", "cudnn", False) == "cudnn"
    assert kernels.with_measured("auto", "cudnn", True) == "auto"
    assert kernels.with_measured("auto", "fa3", False) == "auto", "measured on a machine that has it"
    assert kernels.with_measured("cuda_flash", "cudnn", False) == "cuda_flash"


@pytest.fixture
def flash_attention_3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, whose operators are those of the CPU, where torch looks for it."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    monkeypatch.setattr(kernels.packages, "FA3", Package("FlashAttention 3", (), ""))
    library = torch.library.Library("flash_attn_3", "DEF")
    for name in ("fwd", "bwd"):
        library.define(f"{name}(Tensor q) -> Tensor")
    yield
    kernels_cuda.install_flash(None)
    kernels._check_fa3.cache_clear()


def test_flash_attention_3_takes_torchs_operators_and_gives_them_back(flash_attention_3: None) -> None:
    def select(name: str, capability: tuple[int, int] = (9, 0)) -> str:
        return kernels.select(name, torch.device("cuda"), torch.bfloat16, 128, 1.0, capability=capability).name

    current = torch.nn.attention.current_flash_attention_impl
    assert (select("fa3"), current()) == ("fa3", "FA3")
    assert (select("fa3"), current()) == ("fa3", "FA3")
    assert (select("cudnn"), current()) == ("cudnn", None), (
        "tiles that cuDNN must not get go to the flash it was tested with"
    )
    with pytest.raises(ConfigError, match=r"needs compute capability 9\.0 .*, here is 8\.9"):
        select("fa3", (8, 9))


def test_calls_reach_flash_attention_3_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch's own code for it, whose last two functions here compute on the CPU."""
    cpu = kernels.CpuFlash(0.25)

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        (scale, causal), packed = rest[20:22], rest[4] is not None
        assert (scale, packed) == (0.25, False)
        out, lse = cpu.forward(*(x.transpose(1, 2) for x in (q, k, v)), causal)
        return out.transpose(1, 2), lse, None, None

    def bwd(dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> None:
        out, lse, dq, dk, dv = rest[:5]
        assert rest[11] == 0.25
        assert lse.is_contiguous()
        q_, k_, v_, out_, dout_ = (x.transpose(1, 2) for x in (q, k, v, out, dout))
        found = cpu.backward(dout_, Attended(q_, k_, v_, out_, lse), rest[12])
        for target, grad in zip((dq, dk, dv), found, strict=True):
            target.copy_(grad.transpose(1, 2))

    for name, value in {
        "_FA3_CUDA_FWD": fwd,
        "_FA3_CUDA_BWD": bwd,
        "_fa3_common_support_error": lambda *_: None,
    }.items():
        monkeypatch.setattr(_fa3, name, value)
    operators = SimpleNamespace(
        _flash_attention_forward=_fa3._fa3_flash_attention_forward_impl_default,
        _flash_attention_backward=_fa3._fa3_flash_attention_backward_impl,
    )
    monkeypatch.setattr(kernels_cuda, "aten", operators)
    q, k, v, dout = (x.bfloat16() for x in map(bhsd, inputs(24, 1, 4, 2, 16)))
    kernel = kernels_cuda.FlashAttention3(0.25)
    for causal in (True, False):
        found, right = kernel.forward(q, k, v, causal), cpu.forward(q, k, v, causal)
        grads = kernel.backward(dout, Attended(q, k, v, *found), causal)
        for a, b in zip(
            (*found, *grads), (*right, *cpu.backward(dout, Attended(q, k, v, *right), causal)), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", ["cuda_flash", "cudnn"])
def test_cuda_operators_accept_these_calls_and_shapes(kernel: str) -> None:
    """On meta tensors: argument order, shapes and strides against the operators' own schemas; no GPU computes."""
    q, dout = (torch.empty(64, 1, 8, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(64, 1, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    q, k, v, dout = map(bhsd, (q, k, v, dout))
    chosen = kernels.select(kernel, torch.device("cuda"), torch.bfloat16, 64, 0.125)
    for cu_seqlens in (None, (0, 5, 64)) if chosen.varlen else (None,):
        out, lse = chosen.forward(q, k, v, True, cu_seqlens)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:-1], torch.float32)
        grads = chosen.backward(dout, Attended(q, k, v, out, lse), True, cu_seqlens)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
