"""Which kernel is a tile sent to? Bad tiles never reach the kernel that gets them wrong, whatever the documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention import blocks, gather, kernels, ring
from megalong.attention.blocks import bhsd
from megalong.attention.guards import ADDRESSABLE, Addressable, RegularTiles
from megalong.attention.kernel import Attended, CuSeqlens, Grads
from megalong.attention.tiles import Tiles, pairs
from megalong.runtime.errors import ConfigError
from tests.attention.reference import inputs

CHUNK = 256
Call = tuple[int, int, bool, int]
"""Rows, keys, causal, documents."""


class Recording:
    """Notes the calls it is given; on meta tensors, so that they may be of any size."""

    def __init__(self, name: str, varlen: bool) -> None:
        self.name, self.varlen = name, varlen
        self.calls: list[Call] = []
        self.elements = 0

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, cu_seqlens: CuSeqlens = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((q.shape[2], k.shape[2], causal, len(cu_seqlens or (0, 1)) - 1))
        padded = q.shape[2] + 128 * max(1, len(cu_seqlens or ()) - 1)
        batch, heads, _, channels = q.shape
        self.elements = max(self.elements, batch * heads * channels * max(padded, k.shape[2]))
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

    def backward(self, dout: torch.Tensor, attended: Attended, causal: bool, cu_seqlens: CuSeqlens = None) -> Grads:
        self.forward(*attended[:3], causal, cu_seqlens)
        return torch.empty_like(attended.q), torch.empty_like(attended.k), torch.empty_like(attended.v)


def meta(rows: int, heads: int, channels: int = 64) -> torch.Tensor:
    return bhsd(torch.empty(rows, 1, heads, channels, dtype=torch.bfloat16, device="meta"))


def play(steps: list[Tiles], tokens: int, keys: int) -> tuple[Recording, Recording]:
    """Every tile of `steps`, forward and backward, through the guard; (cuDNN's calls, flash's calls)."""
    fast, sound = Recording("cudnn", False), Recording("cuda_flash", True)
    kernel = RegularTiles(fast, sound, tokens // 2)
    q, k = meta(tokens, 4), meta(keys, 2)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    for tiles in steps:
        for call in blocks.calls(tiles, kernel):
            t = call.tile
            part = Attended(*(x[:, :, t.k0 : t.k1] if i in (1, 2) else x[:, :, t.q0 : t.q1]
                              for i, x in enumerate((q, k, k, out))), lse[:, :, t.q0 : t.q1])  # fmt: skip
            kernel.forward(*part[:3], t.causal, call.cu_seqlens)
            kernel.backward(part.out, part, t.causal, call.cu_seqlens)
    return fast, sound


@pytest.mark.parametrize("size", [1, 4])
def test_without_documents_every_tile_goes_to_the_fast_kernel_in_few_shapes(size: int) -> None:
    length = 2 * CHUNK * size
    for rank in range(size):
        fast, sound = play(list(ring.plan(length, size, rank, None)), 2 * CHUNK, 2 * CHUNK)
        assert not sound.calls
        assert len(set(fast.calls)) <= 3


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 2, 4]),
    rank=st.integers(0, 3),
    starts=st.sets(st.integers(1, 2047) | st.sampled_from([64, 128, 192, 256, 320, 448, 512, 1024]), max_size=8),
    chunk=st.sampled_from([256, 192, 100, 1]),
    gathered=st.booleans(),
)
def test_no_document_brings_a_tile_that_the_fast_kernel_gets_wrong(
    size: int, rank: int, starts: set[int], chunk: int, gathered: bool
) -> None:
    length, rank = 2 * chunk * size, rank % size
    documents = (0, *sorted(s for s in starts if s < length))
    if gathered and size > 1:
        plan = gather.plan(length, size, rank, documents)
        steps, keys = [plan.own, plan.early, plan.late], 2 * chunk * size
    else:
        steps, keys = list(ring.plan(length, size, rank, documents)), 2 * chunk
    fast, sound = play(steps, 2 * chunk, keys)
    for rows, columns, _, runs in fast.calls:
        # keys % 128 == 64 (pytorch #196678), one row (cudnn-frontend #1072, #1071), plans without end (#190388)
        assert rows % 128 == columns % 128 == 0
        assert rows >= 128
        assert columns >= 128
        assert rows % chunk == columns % chunk == 0
        assert runs == 1
    if chunk % 128:
        assert not fast.calls
    done = sum(r * (r + 1) // 2 if c else r * k for r, k, c, d in fast.calls if d == 1)
    assert done <= 2 * sum(map(pairs, steps))
    if not sound.calls:
        assert done == 2 * sum(map(pairs, steps))


def test_the_answer_is_the_same_whichever_kernel_computes_a_tile() -> None:
    q, k, v, dout = map(bhsd, inputs(512, 1, 4, 2, 16))
    reference = kernels.Reference(0.25)
    guarded = RegularTiles(kernels.CpuFlash(0.25), reference, 128)
    for rows, cu_seqlens in ((512, None), (320, None), (512, (0, 64, 65, 512))):
        part = [x[:, :, :rows] for x in (q, k, v)]
        right = reference.forward(*part, True, cu_seqlens)
        found = guarded.forward(*part, True, cu_seqlens)
        torch.testing.assert_close(found, right)
        attended = Attended(*part, *right)
        torch.testing.assert_close(
            guarded.backward(dout[:, :, :rows], attended, True, cu_seqlens),
            reference.backward(dout[:, :, :rows], attended, True, cu_seqlens),
        )


@pytest.mark.parametrize("fit", [1, 2, 3, 4, 8, 9, 16, 100])
def test_calls_cut_along_the_heads_give_the_whole_answer(fit: int) -> None:
    """`fit`: query heads whose tensors are addressable."""
    q, k, v, dout = map(bhsd, inputs(40, 2, 8, 2, 16))
    reference = kernels.Reference(0.25)
    right = reference.forward(q, k, v, True, (0, 7, 40))
    cut = Addressable(reference, 2 * (40 + 256) * 16 * fit + 1)
    torch.testing.assert_close(cut.forward(q, k, v, True, (0, 7, 40)), right)
    attended = Attended(q, k, v, *right)
    torch.testing.assert_close(
        cut.backward(dout, attended, True, (0, 7, 40)), reference.backward(dout, attended, True, (0, 7, 40))
    )


@pytest.mark.parametrize(
    ("rows", "keys", "heads", "kv_heads", "parts"),
    [
        (524_288, 524_288, 32, 8, 2),  # 2**31 elements to the bit
        (524_160, 524_160, 32, 8, 2),  # flash's dQ rounds the rows up and comes to it
        (32_768, 32_768, 16, 4, 1),
        (1_048_576, 32_768, 32, 8, 3),
        (32_768, 1_048_576, 32, 8, 3),  # dK and dV of every query head are as many as the keys
        (4_194_304, 4_194_304, 8, 1, 3),
    ],
)
def test_no_call_reaches_what_32_bits_address(rows: int, keys: int, heads: int, kv_heads: int, parts: int) -> None:
    q, k = meta(rows, heads, 128), meta(keys, kv_heads, 128)
    kernel = Recording("cuda_flash", True)
    out, lse = Addressable(kernel).forward(q, k, k, False)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])
    assert kernel.elements < ADDRESSABLE
    assert len(kernel.calls) == parts
    Addressable(kernel).backward(out, Attended(q, k, k, out, lse), False)
    assert kernel.elements < ADDRESSABLE
    assert len(kernel.calls) == 2 * parts


@pytest.mark.parametrize(
    ("capability", "head_dim", "name"),
    [((9, 0), 128, "cudnn"), ((9, 0), 256, "cuda_flash"), ((8, 9), 128, "cuda_flash"), ((8, 0), 64, "cuda_flash")],
)
def test_auto_chooses_by_compute_capability(capability: tuple[int, int], head_dim: int, name: str) -> None:
    chosen = kernels.select("auto", torch.device("cuda"), torch.bfloat16, head_dim, 1.0, 1024, capability)
    assert chosen.name == name


def test_deterministic_runs_take_the_kernel_whose_backward_is() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        cuda = torch.device("cuda")
        assert kernels.select("auto", cuda, torch.bfloat16, 128, 1.0, 1024, (9, 0)).name == "cuda_flash"
        with pytest.raises(ConfigError, match="no deterministic backward"):
            kernels.select("cudnn", cuda, torch.bfloat16, 128, 1.0, 1024, (9, 0))
    finally:
        torch.use_deterministic_algorithms(False)
