"""When does a chain of elementwise operators become one kernel? On a GPU, by torch.compile, where `choose` found it so.

A function made by `fused` runs its plain operators until then, and always on the CPU. It is called without autograd, so
that it is compiled once for the first pass and for what backward computes again: the same kernel gives the same bits in
both. Roundings between operators stay where the plain ones have them (inductor would leave them out).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megalong.runtime import device, packages

Function = TypeVar("Function", bound=Callable[..., Any])

BACKEND = "inductor"
"""torch.compile's; on CUDA it writes Triton kernels."""
VARIANTS = 64
"""Of one function: dtypes, memory orders, lengths of one and of many. torch's own limit is 8, and it raises."""
_in_use = False


def choose(wanted: str, deterministic: bool) -> bool:
    """Whether functions are compiled from now on.

    Args:
        wanted: `train.elementwise`.
        deterministic: `train.deterministic`.

    Raises:
        ConfigError: triton was chosen and is not installed.
    """
    global _in_use
    if wanted == "triton":
        packages.require(packages.TRITON, "train.elementwise=triton", "train.elementwise=auto")
    _in_use = packages.elementwise(wanted, device.on_cuda(), deterministic) == "triton"
    return _in_use


def in_use() -> bool:
    """Whether functions are compiled."""
    return _in_use


def fused(plain: Function) -> Function:
    """The function, compiled whole at its first call where that is in use. Tensors in, tensors out; it may write into
    its arguments."""
    compiled: dict[str, Callable[..., Any]] = {}

    @functools.wraps(plain)
    def called(*args: Any) -> Any:
        if not _in_use:
            return plain(*args)
        if BACKEND not in compiled:
            exact: dict[str, Any] | None = {"emulate_precision_casts": True} if BACKEND == "inductor" else None
            torch._dynamo.config.recompile_limit = VARIANTS  # type: ignore[attr-defined]
            compiled[BACKEND] = torch.compile(plain, fullgraph=True, backend=BACKEND, options=exact)
        return compiled[BACKEND](*args)

    return called  # type: ignore[return-value]
