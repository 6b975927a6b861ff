"""Do the attention kernels of this device compute attention? Each against fp64, on tiles that kernels have got wrong.

Tiles: odd lengths; keys % 128 == 64 with a final log-sum-exp below -88.7 (NaN in cuDNN's backward, pytorch #196678); a
single query row (cudnn-frontend #1072); B = H = S = 1 (#1071); many documents in one call; and, on a GPU, queries of
more than 2^31 elements (flash-attention #767). What reaches a kernel goes through `attention.kernels.select`, so guards
that send a tile elsewhere are tested with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megalong.attention import kernels
from megalong.attention.kernel import Attended, CuSeqlens
from megalong.attention.requirements import KERNELS
from megalong.doctor.part import Round
from megalong.doctor.result import NOT_RUN, Check, held
from megalong.runtime import device
from megalong.runtime.errors import ConfigError

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative L2 distance to fp64, of the output and of each gradient: some times what rounding to that dtype leaves."""
LARGE_ROWS, LARGE_KEYS = 2**19 + 128, 256
LARGE_GIB = 40
"""Queries, outputs and their gradients in bf16, and an fp32 accumulator of dQ: 26 GiB, and what backward copies."""
PIECE = 8192


@dataclass(frozen=True)
class Tile:
    """One call."""

    name: str
    queries: int
    keys: int
    causal: bool = False
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    documents: CuSeqlens = None
    low: float = 0.0
    """Scores are lowered by this much, and with them the log-sum-exp."""
    slack: float = 1.0
    """Times the limit: where gradients are small differences of large numbers."""


TILES = (
    Tile("causal square", 256, 256, causal=True),
    Tile("full rectangle", 128, 320),
    Tile("odd causal square", 257, 257, causal=True),
    Tile("odd rectangle", 193, 131),
    Tile("keys % 128 == 64", 128, 192),
    Tile("keys % 128 == 64, low log-sum-exp", 128, 192, low=100.0, slack=5.0),
    Tile("one query row", 1, 96),
    Tile("one key", 33, 1),
    Tile("one of everything", 1, 1, heads=1, kv_heads=1),
    Tile("as many kv heads as heads", 96, 96, causal=True, kv_heads=4),
    Tile("head dim 128", 130, 130, causal=True, head_dim=128),
    Tile("documents", 200, 200, causal=True, documents=(0, 1, 64, 127, 200)),
)


def tensors(tile: Tile, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v, dout of one tile, [1, heads, S, D]."""
    generator = torch.Generator().manual_seed(7)
    shapes = (tile.queries, tile.heads), (tile.keys, tile.kv_heads), (tile.keys, tile.kv_heads), shapes_of(tile)
    q, k, v, dout = (torch.randn(1, n, s, tile.head_dim, generator=generator) for s, n in shapes)
    shift = (tile.low / tile.head_dim**0.5) ** 0.5  # (q + a)(k - a) lowers each score by about a^2 sqrt(D)
    return tuple(x.to(dtype).to(device.device()) for x in (q + shift, k - shift, v, dout))


def shapes_of(tile: Tile) -> tuple[int, int]:
    return tile.queries, tile.heads


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """Relative L2 distance in fp64; infinite where something is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - right).norm() / right.norm().clamp_min(1e-30))


def worst(name: str, tile: Tile, dtype: torch.dtype) -> tuple[float, str] | None:
    """The largest distance of a kernel's output and gradients on one tile, and what it is of; None where the kernel
    takes no documents.

    Raises:
        ConfigError: the kernel does not run here, or not with this dtype or head dim.
    """
    scale = tile.head_dim**-0.5
    kernel = kernels.select(name, device.device(), dtype, tile.head_dim, scale)
    if tile.documents is not None and not kernel.varlen:
        return None
    q, k, v, dout = tensors(tile, dtype)
    definition = kernels.Reference(scale)
    out, lse = kernel.forward(q, k, v, tile.causal, tile.documents)
    q_, k_, v_, dout_ = (x.double() for x in (q, k, v, dout))
    right_out, right_lse = definition.forward(q_, k_, v_, tile.causal, tile.documents)
    # as a ring does: backward is given the final output and log-sum-exp
    grads = kernel.backward(dout, Attended(q, k, v, out, lse.float()), tile.causal, tile.documents)
    right = definition.backward(dout_, Attended(q_, k_, v_, right_out, right_lse), tile.causal, tile.documents)
    found = {"output": distance(out, right_out), "log-sum-exp": distance(lse, right_lse)}
    found |= {what: distance(g, r) for what, g, r in zip(("dq", "dk", "dv"), grads, right, strict=True)}
    if tile.keys == 1:  # a softmax over one key has no gradient: what rounding leaves is held against dv instead
        size = float(right[2].norm())
        found |= {w: float(g.double().norm()) / size for w, g in zip(("dq", "dk"), grads, strict=False)}
    what = max(found, key=lambda name: found[name])
    return found[what], what


def on_rank() -> list[Check]:
    """All kernels of this device on all tiles, as a task for one rank."""
    dtypes = LIMITS if device.device().type == "cpu" else {torch.bfloat16: LIMITS[torch.bfloat16]}
    return list(itertools.chain.from_iterable(_kernel(n, d) for n in KERNELS if n != "auto" for d in dtypes))


def _kernel(name: str, dtype: torch.dtype) -> Iterator[Check]:
    figures: dict[str, tuple[float, str]] = {}
    title = f"{name} in {str(dtype).removeprefix('torch.')}"
    for tile in TILES:
        try:
            found = worst(name, tile, dtype)
        except ConfigError as error:
            if tile is TILES[0]:
                if dtype is torch.bfloat16:  # said once
                    yield Check(name, NOT_RUN, str(error).split(": ")[0])
                return
            continue
        if found is not None:
            figures[tile.name] = (found[0] / tile.slack, found[1])
    limit = LIMITS[dtype]
    bad = {tile: f for tile, f in figures.items() if not f[0] <= limit}
    shown = bad or dict([max(figures.items(), key=lambda f: f[1][0])])
    text = "; ".join(f"{tile}: {what} {value:.1e}" for tile, (value, what) in shown.items())
    yield held(f"{title}, {len(figures)} tiles", not bad, text, f"<= {limit:.0e} of fp64")


def large() -> list[Check]:
    """Queries of more than 2^31 elements, every flash kernel; the reference walks over pieces of rows. Needs a GPU."""
    heads, kv_heads, head_dim = 32, 8, 128
    here, dtype = device.device(), torch.bfloat16
    found = []
    for name in kernels.on_this_gpu():
        kernel = kernels.select(name, here, dtype, head_dim, head_dim**-0.5)
        torch.manual_seed(11)
        q, dout = (torch.randn(1, LARGE_ROWS, heads, head_dim, device=here, dtype=dtype).transpose(1, 2) for _ in "qd")
        k, v = (torch.randn(1, LARGE_KEYS, kv_heads, head_dim, device=here, dtype=dtype).transpose(1, 2) for _ in "kv")
        out, lse = kernel.forward(q, k, v, False)
        dq, dk, dv = kernel.backward(dout, Attended(q, k, v, out, lse), False)
        figure = _against_pieces(q, k, v, dout, {"output": out, "dq": dq, "dk": dk, "dv": dv})
        limit = LIMITS[dtype]
        text = ", ".join(f"{what} {value:.1e}" for what, value in figure.items())
        title = f"{name}, {q.numel():,} elements (2^31 is {2**31:,})"
        found.append(held(title, max(figure.values()) <= limit, text, f"<= {limit:.0e} of fp64"))
        del q, k, v, dout, out, lse, dq, dk, dv
        torch.cuda.empty_cache()
    return found


def _against_pieces(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, found: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Distances of a call's results, the reference computed for some thousand rows at a time."""
    definition = kernels.Reference(q.shape[-1] ** -0.5)
    k_, v_ = k.double(), v.double()
    keys = {"dk": torch.zeros_like(k_), "dv": torch.zeros_like(v_)}
    off: dict[str, Any] = dict.fromkeys(("output", "dq"), 0.0)
    size: dict[str, Any] = dict.fromkeys(("output", "dq"), 0.0)
    for start in range(0, q.shape[2], PIECE):
        rows = slice(start, start + PIECE)
        q_, dout_ = q[:, :, rows].double(), dout[:, :, rows].double()
        out, lse = definition.forward(q_, k_, v_, False)
        dq, dk, dv = definition.backward(dout_, Attended(q_, k_, v_, out, lse), False)
        keys["dk"] += dk
        keys["dv"] += dv
        for what, right in (("output", out), ("dq", dq)):
            off[what] += (found[what][:, :, rows].double() - right).square().sum()
            size[what] += right.square().sum()
    distances = {what: float((off[what] / size[what]).sqrt()) for what in off}
    return distances | {what: distance(found[what], right) for what, right in keys.items()}


def run(visit: Round) -> list[Check]:
    """All of it."""
    found = visit.ranks.run(on_rank, 1)[0]
    if not visit.on_gpu:
        return found
    least = min((gpu.memory_gib or 0.0 for gpu in visit.machine.gpus), default=0.0)
    if least < LARGE_GIB:
        return [*found, Check("more than 2^31 elements", NOT_RUN, f"{least:.0f} GiB, and {LARGE_GIB} are needed")]
    return found + visit.ranks.run(large, 1)[0]
