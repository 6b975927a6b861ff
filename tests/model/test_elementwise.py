"""Fused pieces are traced whole, and give the plain operators' numbers and gradients; megatron's modules take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor
from torch.nn.functional import silu

from megalong.attention.merge import merge_
from megalong.model import elementwise
from megalong.model.rotary import LocalRotaryEmbedding
from megalong.runtime import fused, packages
from megalong.runtime.ranks import RankPool
from megalong.training.verify import relative_distance
from tests.training.passes import one_pass, run_of, with_settings

LENGTHS = {torch.float32: (6, 7), torch.bfloat16: (7, 1)}
INV_FREQ = 500000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float32) / 8)


@contextmanager
def compiled(backend: str) -> Iterator[None]:
    """Functions are compiled, also on the CPU."""
    before, chosen = fused.BACKEND, packages.elementwise
    fused.BACKEND, packages.elementwise = backend, lambda *_: "triton"
    fused.choose("auto", False)
    try:
        yield
    finally:
        fused.BACKEND, packages.elementwise = before, chosen
        fused.choose("torch", False)


def merged(out: Tensor, lse: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_` on views of whole tensors, as the ring gives it."""
    whole, whole_lse = torch.cat((out, out), 2), torch.cat((lse, lse), 2)
    merge_(whole[:, :, out.shape[2] :], whole_lse[:, :, out.shape[2] :], out_b, lse_b)
    return whole, whole_lse


def calls(length: int, dtype: torch.dtype) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every fused function with arguments as a layer gives them."""
    torch.manual_seed(length)

    def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    x, wide, weight = some(length, 1, 16), some(length, 1, 24), some(16)
    heads, table = some(length, 1, 4, 10)[..., :8], some(2, length, 1, 1, 8)
    partial = some(length, 1, 4, 8).permute(1, 2, 0, 3)
    out, lse, lse_b = (some(1, 4, length, *d, dtype=torch.float32) for d in ((8,), (), ()))
    return [
        (elementwise.rms_norm, (x, weight, 1e-5)),
        (elementwise.rms_norm_backward, (some(length, 1, 16), x, weight, 1e-5)),
        (elementwise.silu_times, (wide,)),
        (elementwise.silu_times_backward, (some(length, 1, 12), wide)),
        (elementwise.turned, (heads, table)),
        (elementwise.turned_back, (some(length, 1, 4, 8), table)),
        (merged, (out, lse, partial, lse_b)),
    ]


def distances(backend: str, dtype: torch.dtype) -> Iterator[float]:
    for length in LENGTHS[dtype]:
        for function, args in calls(length, dtype):
            plain = function(*args)
            with compiled(backend):
                made = function(*args)
            for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (made, plain)), strict=True):
                assert a.dtype == b.dtype
                yield relative_distance(a.float(), b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_is_one_graph_and_gives_the_plain_operators_bits(dtype: torch.dtype) -> None:
    assert set(distances("aot_eager", dtype)) == {0.0}


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_each_as_one_kernel_of_the_cpu(dtype: torch.dtype, limit: float) -> None:
    """By the code generator that writes Triton kernels on a GPU and C++ here; it needs a compiler."""
    assert max(distances("inductor", dtype)) < limit


def glu(wide: Tensor) -> Tensor:
    gate, up = wide.chunk(2, -1)
    return silu(gate) * up


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-7), (torch.bfloat16, 4e-3)], ids=str)
def test_gradients_are_those_of_autograd(dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    x, wide, weight, heads = (torch.randn(*s, dtype=dtype) for s in ((10, 1, 64), (10, 1, 24), (64,), (10, 1, 4, 8)))
    phases, table = (LocalRotaryEmbedding(INV_FREQ, 10, 1, 0, turns=turns)(10) for turns in (None, dtype))
    for step, plain, args in (
        (elementwise.FusedRMSNorm, elementwise.rms_norm, (x, weight, 1e-5)),
        (elementwise.FusedSwiGLU, glu, (wide,)),
        (elementwise.FusedRotation, lambda q, _: _apply_rotary_pos_emb_bshd(q, phases), (heads, table)),
    ):
        inputs = [a.requires_grad_() for a in args if isinstance(a, Tensor) and a is not table]
        made, expected = step.apply(*args), plain(*args)
        assert torch.equal(made, expected), step
        grad = torch.randn_like(made)
        for a, b in zip(*(torch.autograd.grad(y, inputs, grad) for y in (made, expected)), strict=True):
            assert relative_distance(a.float(), b.float()) < limit, step


def passes() -> tuple[float, float, bool, set[str]]:
    """A whole pass with compiled pieces in fp32: distance of loss and gradients from plain ones, whether recompute
    changes a bit of it, and the modules that the model is then made of."""
    from megalong.model.gpt import build

    run = with_settings(run_of([]), {"recompute": "none"}, {}, "fp32")
    plain = one_pass(run)
    with compiled("eager"):
        model = build(run)
        made, kept = one_pass(run, model), one_pass(with_settings(run, {"recompute": "attention_kept"}, {}, "fp32"))
    gradients = max(relative_distance(a, b) for a, b in zip(made.gradients, plain.gradients, strict=True))
    names = {type(module).__name__ for module in model[0].modules()}
    return abs(made.loss - plain.loss), gradients, kept.same_as(made), names


def test_a_model_of_compiled_pieces_trains_as_the_plain_one_and_recompute_changes_no_bit(ranks: RankPool) -> None:
    loss, gradients, same, names = ranks.run(passes, 1)[0]
    assert loss < 1e-6
    assert gradients < 1e-6
    assert same
    assert {"FusedMLP", "FusedSelfAttention"} <= names
