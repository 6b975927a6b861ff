"""The canary is silent on sound attention and names the ranks of planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType

from megalong.attention import canary
from megalong.attention.canary import INPUTS
from megalong.attention.core import CoreAttention
from megalong.attention.exchange import Exchange, Pending, Ring
from megalong.attention.kernels import CpuFlash
from megalong.config.schema import AttentionConfig
from megalong.runtime.errors import CanaryError
from megalong.runtime.ranks import RankPool
from tests.attention.test_core import config


def verdict(attention: AttentionConfig, kv_heads: int = 4, fault: str = "", dtype: torch.dtype = torch.float32) -> str:
    """What the canary says on this rank, with a fault planted; empty: it found nothing."""
    size = dist.get_world_size()
    parallel_state.initialize_model_parallel(
        context_parallel_size=size,
        hierarchical_context_parallel_sizes=attention.hierarchical_context_parallel_sizes,
    )
    core = CoreAttention(
        config(size, 1, kv_heads, params_dtype=dtype), 1, AttnMaskType.causal, "self", attention=attention
    )
    cp_rank = dist.get_rank()
    undo: list[tuple[Any, str, Callable[..., Any]]] = []

    def plant(owner: Any, name: str, wrong: Callable[..., Any]) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, wrong)

    if fault == "never rotates":
        plant(Ring, "shift", keep_own)
    elif fault == "gathers nothing":
        plant(Exchange, "all_gather", repeat_own)
    elif fault == "swapped":
        cp_rank = {1: 2, 2: 1}.get(cp_rank, cp_rank)  # the data's numbers, not the group's
    elif fault == "boundaries ignored":
        plant(CoreAttention, "_documents", lambda self, starts: None)
    elif fault.endswith(" zero"):
        plant(CpuFlash, "backward", without_gradient(INPUTS.index(fault.removesuffix(" zero"))))
    elif fault.endswith(" of another rank lost"):
        plant(Ring, "shift", forgetful_shift(["keys", "values"].index(fault.split()[0])))
    elif fault == "same data twice":
        cp_rank = 0
    try:
        canary.check(core, cp_rank, torch.device("cpu"))
    except CanaryError as error:
        return str(error)
    finally:
        for owner, name, right in undo:
            setattr(owner, name, right)
    return ""


def keep_own(self: Ring, *moves: Any) -> Pending:
    for _, mine, there in moves:
        there.copy_(mine)
    return Pending(())


def repeat_own(self: Exchange, parts: Any) -> Any:
    return [x.repeat(self.size, *[1] * (x.dim() - 1)) for x in parts], Pending(())


def without_gradient(which: int) -> Callable[..., Any]:
    right = CpuFlash.backward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return tuple(g.zero_() if i == which else g for i, g in enumerate(right(*args, **kwargs)))

    return wrong


def forgetful_shift(which: int) -> Callable[..., Any]:
    """Gradients on their way to another rank arrive without those of the keys, or of the values."""
    right = Ring.shift

    def wrong(self: Ring, *moves: Any) -> Pending:
        for kind, mine, _ in moves:
            if kind == "ring_dkv":
                mine[which].zero_()
        return right(self, *moves)

    return wrong


@pytest.mark.parametrize("documents", ["none", "intra"])
@pytest.mark.parametrize(
    ("algorithm", "size", "sizes"),
    [("p2p", 1, None), ("p2p", 4, None), ("a2a", 4, None), ("a2a+p2p", 4, [2, 2]), ("all_gather", 4, None)],
)
def test_sound_attention_passes(
    ranks: RankPool, algorithm: str, size: int, sizes: list[int] | None, documents: str
) -> None:
    attention = AttentionConfig(
        cp_comm_type=algorithm, hierarchical_context_parallel_sizes=sizes, document_mask=documents
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert set(ranks.run(verdict, size, attention, dtype=dtype)) == {""}


def test_a_ring_that_never_rotates_is_found_with_the_ranks_named(ranks: RankPool) -> None:
    said = ranks.run(verdict, 4, AttentionConfig(), fault="never rotates")
    assert len(set(said)) == 1, "every rank must stop with the same words"
    assert "tokens of rank 0 do not reach ranks 1, 2, 3" in said[0]
    inner = AttentionConfig(cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2])
    said = ranks.run(verdict, 4, inner, fault="never rotates")
    assert "tokens of rank 0 do not reach ranks 2, 3" in said[0]


def test_a_gather_that_brings_nothing_is_found(ranks: RankPool) -> None:
    said = ranks.run(verdict, 4, AttentionConfig(cp_comm_type="all_gather"), fault="gathers nothing")
    assert "tokens of rank 0 do not reach ranks 1, 2, 3" in said[0]


@pytest.mark.parametrize("algorithm", ["p2p", "a2a", "all_gather"])
def test_ranks_that_swap_places_are_found(ranks: RankPool, algorithm: str) -> None:
    said = ranks.run(verdict, 4, AttentionConfig(cp_comm_type=algorithm), fault="swapped")
    assert len(set(said)) == 1
    assert "tokens of rank 1 change earlier positions on ranks" in said[0]
    assert "tokens of rank 2 do not reach ranks" in said[0]


def test_ignored_boundaries_are_found(ranks: RankPool) -> None:
    for size in (1, 4):
        said = ranks.run(verdict, size, AttentionConfig(document_mask="intra"), fault="boundaries ignored")
        assert "tokens of rank 0 cross a document boundary" in said[0]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("which", INPUTS)
def test_a_kernel_without_one_of_its_gradients_is_found(ranks: RankPool, which: str, size: int) -> None:
    said = ranks.run(verdict, size, AttentionConfig(), fault=f"{which} zero")
    assert f"gradients of outputs on rank 0 do not reach the {which} of ranks 0" in said[0]


@pytest.mark.parametrize("which", ["keys", "values"])
def test_gradients_that_do_not_come_home_from_other_ranks_are_found(ranks: RankPool, which: str) -> None:
    said = ranks.run(verdict, 4, AttentionConfig(), fault=f"{which} of another rank lost")
    assert f"gradients of outputs on rank 1 do not reach the {which} of ranks 0" in said[0]
    assert len(said[0].splitlines()) == 1 + 4, said[0]


def test_ranks_with_the_same_data_are_found(ranks: RankPool) -> None:
    said = ranks.run(verdict, 2, AttentionConfig(), fault="same data twice")
    assert "ranks 0, 1 hold data by the same context-parallel number" in said[1]
