"""What is computed again changes no bit of a gradient, and kept attention is computed once."""

from __future__ import annotations

import gc
import itertools
import weakref
from contextlib import suppress
from typing import Any

import pytest

from megalong.attention.kept import Kept
from megalong.attention.kernels import CpuFlash
from megalong.recipe.resolve import run_of as resolved
from megalong.runtime.errors import ConfigError
from megalong.runtime.ranks import RankPool
from tests.training.passes import BATCH, LAYERS, MODEL, WINDOW, one_pass, run_of, with_settings
from tests.training.test_parity import LAYOUTS, sizes
from tests.variants import long_but

KEPT = {"recompute": "attention_kept"}
OTHERS = [{"recompute": "full"}, KEPT]
ON_HOST = [{"recompute": "full", "keep_on": "host"}, {**KEPT, "keep_on": "host"}]
WAYS = {
    "a2a": ["attention.cp_comm_type=a2a"],
    "all_gather": ["attention.cp_comm_type=all_gather"],
    "a2a+p2p": ["attention.cp_comm_type=a2a+p2p", "attention.hierarchical_context_parallel_sizes=[2,2]"],
}


Cases = tuple[tuple[str, str], ...]
"""Precisions and document masks."""
CROSSED: Cases = (("fp32", "intra"), ("bf16", "none"))
STRAIGHT: Cases = (("fp32", "none"), ("bf16", "intra"))


def compared(
    overrides: list[str], others: list[dict[str, Any]], cases: Cases
) -> dict[tuple, tuple[bool, Any, Any, Any]]:
    """By precision, mask and setting: same bits as without recompute, kernel calls, bytes; and those without."""
    run, found = run_of(overrides), {}
    for precision, mask in cases:
        attention = {"document_mask": mask}
        plain = one_pass(with_settings(run, {"recompute": "none"}, attention, precision))
        for train in others:
            made = one_pass(with_settings(run, train, attention, precision))
            key = (precision, mask, *train.values())
            found[key] = (made.same_as(plain), made.kernels, made.sent, (plain.kernels, plain.sent))
    return found


def check(found: list[dict[tuple, tuple[bool, Any, Any, Any]]]) -> None:
    for rank, by_case in enumerate(found):
        for case, (same, calls, sent, (plain_calls, plain_sent)) in by_case.items():
            assert same, (rank, case)
            assert calls["backward"] == plain_calls["backward"] > 0
            if "full" in case:
                assert calls["forward"] == 2 * plain_calls["forward"], (rank, case)
            else:
                assert calls["forward"] == plain_calls["forward"], (rank, case)
                # keys and values travel forward once; heads are traded again
                assert {k: v for k, v in sent.items() if k != "a2a"} == {
                    k: v for k, v in plain_sent.items() if k != "a2a"
                }, (rank, case)
                assert sent.get("a2a", 0) * 2 == plain_sent.get("a2a", 0) * 3, (rank, case)


@pytest.mark.parametrize(
    "cases", [CROSSED, pytest.param(STRAIGHT, marks=pytest.mark.long)], ids=["crossed", "straight"]
)
@pytest.mark.parametrize(
    "layout", long_but(LAYOUTS, (1, 4, 1, 1), (2, 2, 2, 1)), ids=lambda x: "tp{} cp{} pp{} dp{}".format(*x)
)
def test_gradients_are_those_without_recompute_bit_for_bit(ranks: RankPool, layout: tuple, cases: Cases) -> None:
    tp, cp, pp, dp = layout
    check(ranks.run(compared, tp * cp * pp * dp, sizes(*layout), [*OTHERS, ON_HOST[-1]], cases))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_move_keys_keeps_its_attention(ranks: RankPool, way: str) -> None:
    check(ranks.run(compared, 4, ["topology.cp=4", *WAYS[way]], ON_HOST, STRAIGHT))


def test_a_ring_moves_four_units_instead_of_five(ranks: RankPool) -> None:
    unit = 3 * 2 * (WINDOW // 4) * MODEL.num_key_value_heads * MODEL.head_dim * 2  # three hops of a bf16 block
    times = unit * LAYERS * BATCH
    for by_case in ranks.run(compared, 4, ["topology.cp=4"], OTHERS, (("bf16", "none"),)):
        for policy, units in (("full", 5), ("attention_kept", 4)):
            _, _, sent, _ = by_case["bf16", "none", policy]
            assert sum(sent.values()) == units * times


def left_over(keep_on: str) -> tuple[list[int], bool]:
    """Kept results alive in backward, after a step, after an evaluation, after a step that failed in the middle; and
    whether the step after that is the first one again, bit for bit."""
    from megalong.model.gpt import build
    from megalong.training.forward import losses_of
    from megalong.training.verify import local_batches, synthetic_samples

    run = with_settings(
        run_of([]), {**KEPT, "keep_on": keep_on}, {"document_mask": "intra", "kernel": "cpu_flash"}, "bf16"
    )
    model, seen, calls = build(run), [], itertools.count()
    found: list[int] = []
    results, backward = Kept.results, CpuFlash.backward
    failing = False

    def watched(self: Kept, attend: Any) -> Any:
        taken = bool(self.tensors)
        out, lse = results(self, attend)
        if not taken:
            seen.append(weakref.ref(lse))
        return out, lse

    def note() -> None:
        gc.collect()
        found.append(sum(one() is not None for one in seen))

    def breaking(self: CpuFlash, *given: Any) -> Any:
        if next(calls) == 0:
            note()
        elif failing:
            raise InterruptedError
        return backward(self, *given)

    Kept.results, CpuFlash.backward = watched, breaking  # type: ignore[method-assign,assignment]
    try:
        expected = one_pass(run, model)
        note()
        batches = local_batches(run, synthetic_samples(run))
        losses_of(run.seq_length, model, batches, run.micro_batches, lambda losses, mask: losses.sum(), ())
        note()
        calls, failing = itertools.count(), True
        with suppress(InterruptedError):
            one_pass(run, model)
        note()
        failing = False
        return found, one_pass(run, model).same_as(expected)
    finally:
        Kept.results, CpuFlash.backward = results, backward  # type: ignore[method-assign]


@pytest.mark.parametrize(("keep_on", "layers_here"), [("device", LAYERS), ("host", 1)])
def test_nothing_kept_outlives_its_step_even_one_that_fails(ranks: RankPool, keep_on: str, layers_here: int) -> None:
    [(alive, right)] = ranks.run(left_over, 1, keep_on)
    in_backward, after, evaluated, beginning, failed = alive
    assert in_backward == beginning == layers_here
    assert after == evaluated == failed == 0
    assert right


def test_the_fastest_policy_that_fits_is_chosen_and_attention_is_kept_where_it_is_ours() -> None:
    assert resolved(["+stage=1048k"]).recompute == "attention_kept"
    assert resolved(["+stage=65k", "cluster=l40s-1x8"]).recompute == "full"  # what is kept leaves too little to spare
    foreign = "attention.backend=transformer_engine"
    assert resolved(["+stage=1048k", foreign]).recompute == "full"
    assert resolved(["+stage=1048k", "train.recompute=none"]).recompute == "none"


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        (["attention.backend=transformer_engine", "train.recompute=attention_kept"], "own layers do that"),
        (["attention.backend=transformer_engine", "train.keep_on=host", "train.mlp_chunk=512"], "train.mlp_chunk=512"),
        (["train.keep_on=host", "train.recompute=selective"], "has no effect with train.recompute=selective"),
    ],
)
def test_what_has_no_effect_is_refused(said: list[str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        resolved(["+stage=65k", "+scale=mini", *said])
