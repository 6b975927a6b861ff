"""Kernels return the log-sum-exp and exact partial gradients; the choice of one is checked."""

import pytest
import torch

from megalong.attention import kernels
from megalong.attention.blocks import bhsd
from megalong.attention.kernel import Attended
from megalong.runtime.errors import ConfigError
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
    ],
)
def test_a_kernel_that_cannot_run_is_refused(
    name: str, device: str, dtype: torch.dtype, head_dim: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        kernels.select(name, torch.device(device), dtype, head_dim, 1.0)


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
