"""The MLP in tiles gives the gradients of the MLP in one piece, and its wide intermediate is never there at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megalong.convert.parameters import load_hf_into
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.training.forward import forward_backward
from megalong.training.gradients import full_gradients
from megalong.training.verify import local_batches, relative_distance
from tests.llamas import run_of_saved
from tests.model.test_head_gradient import batch
from tests.training.parity import BATCH, THETA, WINDOW, hf_model, saved
from tests.training.passes import one_pass, run_of, with_settings

ALL, POLICIES = 10_000, ("none", "full", "attention_kept")
LAYOUTS = {
    "alone": [],
    "tp2": ["topology.tp=2"],
    "tp2 cp2 pp2": ["topology.tp=2", "topology.cp=2", "topology.pp=2"],
    "dp2": ["topology.dp=2"],
}


def one_tile(overrides: list[str]) -> list[str]:
    """Policies whose bf16 gradients are not those of megatron's modules, bit for bit."""
    run = run_of(overrides)
    plain = one_pass(with_settings(run, {"recompute": "none"}, {}, "bf16"))
    tiled = {p: with_settings(run, {"recompute": p, "mlp_chunk": ALL}, {}, "bf16") for p in POLICIES}
    return [policy for policy, settings in tiled.items() if not one_pass(settings).same_as(plain)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_tile_is_megatrons_mlp_bit_for_bit_in_bf16(ranks: RankPool, layout: str) -> None:
    size = 2 ** len(LAYOUTS[layout])
    assert ranks.run(one_tile, size, LAYOUTS[layout]) == [[]] * size


def gradients(folder: str, overrides: list[str], settings: list[tuple[str, str, int, bool]]) -> list[dict[str, Any]]:
    """Whole gradients on rank 0 for each (precision, policy, mlp_chunk, reduced during backward)."""
    from megalong.model.gpt import build

    run = run_of_saved(Path(folder), overrides, WINDOW, THETA)
    initialize(run.layout)
    found = []
    for precision, policy, chunk, overlap in settings:
        run = with_settings(run, {"recompute": policy, "mlp_chunk": chunk}, {}, precision)
        model = build(run, overlap=overlap)
        load_hf_into(model, Path(folder), run.model)
        for _ in range(1 + overlap):  # megatron learns in the first step when a bucket is complete
            forward_backward(WINDOW, model, local_batches(run, batch()), BATCH // run.layout.dp)
        found.append(full_gradients(run, model))
    return found


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(relative_distance(found[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_any_size_give_the_gradients_of_one_piece(ranks: RankPool, layout: str) -> None:
    model = hf_model(mlp_bias=True).bfloat16().float()
    settings = [
        ("fp32", "none", 0, False),
        *(("fp32", "attention_kept", chunk, False) for chunk in (2, 7, ALL)),
        ("fp32", "full", 7, True),
        ("fp32", "none", 7, False),
        ("bf16", "none", 0, False),
        ("bf16", "attention_kept", 2, False),
    ]
    with saved(model) as folder:
        found = ranks.run(gradients, 2 ** len(LAYOUTS[layout]), folder, LAYOUTS[layout], settings)[0]
    plain, two, seven, one, reduced_early, without, plain_bf16, tiled_bf16 = found
    for tiled in (two, seven, one):
        assert worst(tiled, plain) < 2e-6
    for other in (reduced_early, without):
        assert all(torch.equal(other[name], grad) for name, grad in seven.items())
    for name, exact in plain.items():  # 64 tiles, or one: as far from fp32
        assert relative_distance(tiled_bf16[name], exact) <= 1.05 * relative_distance(plain_bf16[name], exact), name


def largest_allocation(chunk: int) -> int:
    """Bytes of the largest tensor that forward and backward make."""
    from megalong.model.gpt import build

    run = run_of(["train.loss_chunk=8"], hidden_size=32, intermediate_size=4096, num_hidden_layers=1)
    run = with_settings(replace(run, seq_length=512), {"mlp_chunk": chunk}, {}, "fp32")
    model = build(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        one_pass(run, model)
    return max(e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")


def test_the_wide_intermediate_never_exists_for_all_tokens(ranks: RankPool) -> None:
    wide = 512 * 2 * 4096 * 4
    [whole] = ranks.run(largest_allocation, 1, 0)
    [tiled] = ranks.run(largest_allocation, 1, 32)
    assert whole >= wide
    assert tiled <= wide // 8
