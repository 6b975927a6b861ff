"""Every part of the doctor passes on a sound machine and fails when what it looks at is broken."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalong.attention import canary as alarm
from megalong.attention.kernels import CpuFlash, Reference
from megalong.config.cluster import load_cluster
from megalong.doctor import canary, cluster, kernels, resume, verify, wires
from megalong.doctor.result import FAIL, NOT_RUN, PASS
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool


def states(checks: list) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def test_sound_kernels_pass_on_every_tile_and_those_of_other_devices_are_not_run() -> None:
    found = states(kernels.on_rank())
    assert {found.pop(name) for name in ("cuda_flash", "cudnn", "fa3")} == {NOT_RUN}
    assert len(found) == 4
    assert set(found.values()) == {PASS}


def spoiled(which: int, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    right = CpuFlash.backward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return tuple(spoil(g) if i == which else g for i, g in enumerate(right(*args, **kwargs)))

    return wrong


@pytest.mark.parametrize(
    "spoil",
    [
        lambda g: g * 1.05,
        lambda g: torch.where(torch.ones_like(g).bool(), float("nan"), g) if g.shape[-2] % 128 == 64 else g,
    ],
    ids=["a gradient off by a twentieth", "NaN on one kind of tile"],
)
def test_a_kernel_that_is_wrong_fails(spoil: Callable[[torch.Tensor], torch.Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr(CpuFlash, "backward", spoiled(1, spoil))
    found = states(kernels.on_rank())
    assert {state for name, state in found.items() if name.startswith("cpu_flash")} == {FAIL}
    assert {state for name, state in found.items() if name.startswith("reference")} == {PASS}


def test_a_low_log_sum_exp_is_really_low() -> None:
    tile = next(t for t in kernels.TILES if t.low)
    q, k, v, _ = kernels.tensors(tile, torch.float32)
    _, lse = Reference(tile.head_dim**-0.5).forward(q, k, v, tile.causal)
    assert float(lse.median()) < -88.7
    assert tile.keys % 128 == 64


def test_the_reference_in_pieces_is_the_reference_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PIECE", 48)
    q, k, v, dout = kernels.tensors(kernels.Tile("", 200, 64), torch.float64)
    definition = Reference(64**-0.5)
    out, lse = definition.forward(q, k, v, False)
    grads = definition.backward(dout, kernels.Attended(q, k, v, out, lse), False)
    found = {"output": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    assert max(kernels._against_pieces(q, k, v, dout, found).values()) < 1e-12
    off = kernels._against_pieces(q, k, v, dout, {**found, "dq": grads[0] * 1.1})
    assert off["dq"] == pytest.approx(0.1)


def carried(fault: bool) -> dict[str, Any]:
    right = dist.all_gather_into_tensor
    if fault:  # a wire that brings every rank's own part only
        dist.all_gather_into_tensor = lambda whole, part: whole.copy_(part.repeat(dist.get_world_size()))
    try:
        return wires.on_ranks(2**16)
    finally:
        dist.all_gather_into_tensor = right


def test_wires_are_measured_and_what_does_not_arrive_is_named(ranks: RankPool) -> None:
    found = ranks.run(carried, 2, False)
    assert all(all(rank["exact"].values()) and len(rank["exact"]) == 5 for rank in found)
    assert min(found[0]["busbw"].values()) > 0
    assert found[0]["hop"]["gbs"] > 0
    assert [name for name, good in ranks.run(carried, 2, True)[0]["exact"].items() if not good] == ["all-gather"]


def canaries(deaf: bool, settings: list[str]) -> dict[str, dict[str, str]]:
    right = alarm.check
    if deaf:
        alarm.check = lambda core, cp_rank, device: None
    try:
        return canary.on_rank({"p2p": ["attention.cp_comm_type=p2p"]}, settings)
    finally:
        alarm.check = right


def test_the_canary_is_heard_where_data_is_swapped_and_boundaries_ignored(ranks: RankPool) -> None:
    settings = ["+stage=65k", "+scale=mini"]
    said = ranks.run(canaries, 2, False, settings)[0]["p2p"]
    assert said.pop("sound") == ""
    assert len(said) == 2
    assert all(said.values())
    assert set(ranks.run(canaries, 2, True, settings)[0]["p2p"].values()) == {""}  # then the part fails


def test_an_algorithm_that_so_many_ranks_cannot_have_is_not_run(ranks: RankPool) -> None:
    found = ranks.run(canary.on_rank, 2, {"a2a": ["attention.cp_comm_type=a2a", "topology.tp=2"]}, ["+stage=65k"])
    assert list(found[0]["a2a"]) == ["not run"]


@pytest.mark.parametrize(("far", "state"), [(1e-6, PASS), (1e-3, FAIL), (math.nan, FAIL)])
def test_a_layout_is_judged_by_its_worst_gradient(far: float, state: str) -> None:
    [check] = verify.judged({"cp 2": (1e-7, far, "lm_head.weight")}, "fp32")
    assert check.state == state
    assert verify.judged({"cp 2": "does not fit"}, "fp32")[0].state == FAIL


def test_every_layout_to_verify_is_valid_on_as_many_ranks() -> None:
    for world in (2, 8):
        for words in verify.layouts(world).values():
            assert run_of(["+stage=65k", "+scale=mini", *verify.SMALL, *words], world).layout.world_size == world


def test_a_layout_that_is_right_is_near_and_one_on_other_weights_is_far(ranks: RankPool, tmp_path: Path) -> None:
    settings = ["+stage=65k", "+scale=mini", *verify.SMALL, "model.num_hidden_layers=1", "precision=fp32"]
    ranks.run(verify.expected, 1, settings, str(tmp_path))
    case = {"cp 2": [*(f"topology.{a}=1" for a in ("tp", "pp", "dp")), "topology.cp=2", verify.INTRA]}
    assert verify.judged(ranks.run(verify.distances, 2, case, settings, str(tmp_path))[0], "fp32")[0].state == PASS
    (tmp_path / "intra.pt").write_bytes((tmp_path / "none.pt").read_bytes())  # boundaries that one side ignores
    assert verify.judged(ranks.run(verify.distances, 2, case, settings, str(tmp_path))[0], "fp32")[0].state == FAIL


STEPS = [{"step": i, "loss": 8.0 - i, "grad_norm": 1.0, "lr": 1e-3} for i in range(4)]
OFF = [*STEPS[:3], {**STEPS[3], "loss": STEPS[3]["loss"] * (1 + 1e-7)}]


@pytest.mark.parametrize(
    ("parts", "stopped", "exact", "state"),
    [
        (STEPS, 2, True, PASS),
        (OFF, 2, True, FAIL),
        (OFF, 2, False, PASS),
        (STEPS, 4, True, FAIL),  # it never stopped
        (STEPS[:3], 2, True, FAIL),
        ([*STEPS[:3], {**STEPS[3], "loss": 6.0}], 2, False, FAIL),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_or_fails(parts: list, stopped: int, exact: bool, state: str) -> None:
    assert resume.judged("", STEPS, parts, stopped, exact).state == state


def test_the_measured_cluster_file_is_one_that_runs_are_planned_with(ranks: RankPool, tmp_path: Path) -> None:
    mini = ["+stage=65k", "+scale=mini"]
    settings = ["cluster=auto", *mini, "topology.cp=2", "model.num_hidden_layers=1"]
    path = tmp_path / "mine.yaml"
    path.write_text(ranks.run(cluster.on_ranks, 2, settings, "mine", str(tmp_path), 1)[0])
    measured = load_cluster(path)
    tags = {name: fact.tag for name, fact in measured.facts().items()}
    wanted = ("gemm_efficiency", "node_gbs", "layer_overhead_s", "step_overhead_s", "memory_gib", "host_memory_gib")
    assert {tags[name] for name in wanted} == {"measured"}
    assert {tags[name] for name in ("gpu_watts", "spine_share", "gpus_per_pair")} == {"assumed"}
    found = run_of([*mini, f"cluster={path}", "cluster.storage_gbs=7"], 2).config.cluster
    assert found.storage_gbs.value == 7
    assert {n: f for n, f in found.facts().items() if n != "storage_gbs"} == {
        n: f for n, f in measured.facts().items() if n != "storage_gbs"
    }
    assert (found.name, found.device, found.gpu) == ("mine", "cpu", measured.gpu)
