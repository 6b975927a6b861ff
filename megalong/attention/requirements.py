"""Which attention settings fit which model and layout? Checked before any process group exists."""

from __future__ import annotations

import math

from megalong.config.schema import AttentionConfig
from megalong.runtime.errors import ConfigError, LayoutError

ALGORITHMS = ("p2p", "a2a", "a2a+p2p", "all_gather")
KERNELS = ("auto", "cpu_flash", "cuda_flash", "cudnn", "fa3", "reference")
DOCUMENT_MASKS = ("none", "intra")
GRAD_WIRE_DTYPES = ("fp32", "model")


def check(attention: AttentionConfig, kv_heads_per_tp: int, cp: int, cp_comm_type: str | None = None) -> None:
    """Refuse what cannot run.

    Args:
        kv_heads_per_tp: key-value heads of one tensor-parallel rank.
        cp: ranks of a context-parallel group.
        cp_comm_type: algorithm, where it is not the one in `attention`.

    Raises:
        ConfigError: a setting is unknown.
        LayoutError: the algorithm cannot share out the heads or the ranks.
    """
    algorithm = cp_comm_type or attention.cp_comm_type
    _known("cp_comm_type", algorithm, ALGORITHMS)
    _known("kernel", attention.kernel, KERNELS)
    _known("document_mask", attention.document_mask, DOCUMENT_MASKS)
    _known("grad_wire_dtype", attention.grad_wire_dtype, GRAD_WIRE_DTYPES)
    if algorithm == "a2a":
        _check_heads(kv_heads_per_tp, cp, cp)
    if algorithm == "a2a+p2p":
        sizes = attention.hierarchical_context_parallel_sizes
        if sizes is None or len(sizes) != 2 or math.prod(sizes) != cp:
            raise LayoutError(
                f"attention.cp_comm_type=a2a+p2p needs attention.hierarchical_context_parallel_sizes=[a,r] with "
                f"a*r = cp = {cp}, not {sizes}: for example [{math.gcd(kv_heads_per_tp, cp)},"
                f"{cp // math.gcd(kv_heads_per_tp, cp)}]."
            )
        _check_heads(kv_heads_per_tp, sizes[0], cp)


def _known(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"attention.{key}={value} is unknown: choose one of {', '.join(choices)}.")


def _check_heads(kv_heads: int, ranks: int, cp: int) -> None:
    """`ranks` that exchange heads each take a whole number of key-value heads."""
    if kv_heads % ranks == 0:
        return
    fits = math.gcd(kv_heads, cp)
    hierarchy = (
        f", or attention.cp_comm_type=a2a+p2p attention.hierarchical_context_parallel_sizes=[{fits},{cp // fits}]"
        if fits > 1
        else ""
    )
    raise LayoutError(
        f"a2a over {ranks} ranks cannot share out {kv_heads} key-value heads per tensor-parallel rank: every rank "
        f"needs a whole number of them. Use attention.cp_comm_type=p2p{hierarchy}."
    )
