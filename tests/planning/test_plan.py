"""The plan answers fast, needs neither torch nor a GPU, refuses what cannot fit, and behaves as physics does."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.cluster import ClusterConfig, Fact, load_cluster
from megalong.planning.activations import LayerTape, Tape
from megalong.planning.choose import SPARE, advice, best_layout, candidates, check_fits, ranking
from megalong.planning.plan import make_plan, plan_of, utilisation
from megalong.planning.report import as_json, report
from megalong.planning.workload import Workload, workload_of
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError, LayoutError
from megalong.topology.layout import Layout
from megalong.topology.placement import cyclic_order
from megalong.topology.valid import layout_problems
from megalong.training.beside import Beside
from tests.data.folders import make_mixed_folder

REPO = Path(__file__).resolve().parents[2]
CARD_TOKENS = {"65k": 62_914_560, "262k": 100_663_296, "524k": 419_430_400, "1048k": 838_860_800}


@functools.cache
def stage(name: str, *overrides: str) -> tuple[Workload, ClusterConfig]:
    run = run_of([f"+stage={name}", *overrides])
    return workload_of(run), run.config.cluster


@pytest.mark.parametrize("name", CARD_TOKENS)
def test_tokens_of_a_stage_are_the_cards_to_the_token(name: str) -> None:
    work, _ = stage(name)
    assert work.tokens_per_step * work.steps == CARD_TOKENS[name]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tools/plan.py", *arguments], cwd=REPO, capture_output=True, text=True, check=False
    )


def test_the_command_prints_one_json_object_and_nothing_else() -> None:
    done = run("+stage=1048k", "alternatives=3", "output=json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tokens"] == CARD_TOKENS["1048k"]
    assert len(found["ranks"]) == 512
    assert len(found["alternatives"]) == 3
    assert sum(found["step_seconds"].values()) == pytest.approx(found["step_total_s"])
    assert sum(found["memory_bytes"].values()) / 2**30 == pytest.approx(found["memory_total_gib"])
    assert all(fact["source"] for fact in found["cluster"]["facts"].values())


def test_what_does_not_fit_ends_with_code_2_and_layouts_that_do() -> None:
    done = run("+stage=65k", "cluster=l40s-1x8", "topology.tp=1", "topology.cp=8", "topology.pp=1", "topology.dp=1")
    assert done.returncode == 2
    assert "DOES NOT FIT" in done.stdout
    assert "Nearest layouts that fit: topology.tp=" in done.stdout


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from megalong.recipe.resolve import run_of; from megalong.planning.plan import plan_of;"
        "plan_of(run_of(['+stage=1048k'])); from megalong.planning import report, choose;"
        "print([m for m in ('torch', 'megatron', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    from megalong.evaluation.plan_picture import draw

    work, cluster = stage("1048k")
    for layout in (Layout(tp=2, cp=32, dp=8), Layout(tp=4, pp=8, dp=16)):
        draw(make_plan(work.on(layout), cluster), "test", tmp_path / "plan.png")
        assert (tmp_path / "plan.png").stat().st_size > 10_000


POWERS = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=60, deadline=None)
@given(
    tp=POWERS,
    cp=POWERS,
    pp=st.sampled_from([1, 2, 4]),
    dp=POWERS,
    axis=st.sampled_from(["cp", "dp"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    precision=st.sampled_from(["bf16", "fp32"]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_memory_never_grows_with_more_context_or_data_parallel_ranks(
    tp, cp, pp, dp, axis, recompute, precision, device
):
    work, cluster = stage("65k")
    work = dataclasses.replace(work, recompute=recompute, precision=precision, device=device)
    layout = Layout(tp=tp, cp=cp, pp=pp, dp=dp)
    wider = dataclasses.replace(layout, **{axis: 2 * getattr(layout, axis)})
    if layout_problems(layout, work.demand) or layout_problems(wider, work.demand):
        return
    cluster = dataclasses.replace(cluster, nodes=Fact(1024, "assumed", "test"))
    before, after = (make_plan(work.on(x), cluster).memory.total for x in (layout, wider))
    assert after <= before


@settings(max_examples=30, deadline=None)
@given(more=st.floats(0, 1000), layout=st.sampled_from([Layout(tp=2, cp=4), Layout(tp=4, cp=2), Layout(cp=8)]))
def test_a_plan_that_fits_fits_with_more_memory(more, layout):
    work, cluster = stage("65k", "cluster=l40s-1x8")
    memory = cluster.memory_gib.value
    larger = dataclasses.replace(cluster, memory_gib=Fact(memory + more, "assumed", "test"))
    if make_plan(work.on(layout), cluster).fits:
        assert make_plan(work.on(layout), larger).fits


def test_no_layout_beats_the_chosen_one_by_more_than_a_percent() -> None:
    work, cluster = stage("262k", "cluster=l40s-4x8")
    plans = list(candidates(work, cluster, 32))
    best = make_plan(work.on(best_layout(work, cluster, 32)), cluster)
    assert best.fits
    roomy = [p for p in plans if p.memory.total <= (1 - SPARE) * p.memory.capacity]
    assert best.step_s <= 1.011 * min(p.step_s for p in roomy)
    assert ranking(plans)[0].work.layout == best.work.layout


def test_pinned_axes_stay_pinned() -> None:
    work, cluster = stage("262k", "cluster=l40s-4x8")
    assert best_layout(work, cluster, 32, tp=4, dp=1).tp == 4
    with pytest.raises(LayoutError):
        best_layout(work, cluster, 32, tp=3)


def test_a_run_that_cannot_fit_is_refused_with_its_heaviest_terms() -> None:
    work, cluster = stage("65k", "cluster=l40s-1x8")
    plan = make_plan(work.on(Layout(cp=8)), cluster)
    with pytest.raises(LayoutError, match=r"gradients 29\.9.*\n.*Nearest layouts that fit"):
        check_fits(plan)
    check_fits(make_plan(work.on(Layout(tp=2, cp=4)), cluster))


def test_settings_that_make_a_kernel_hold_more_are_planned_to_take_more() -> None:
    def attention(*overrides: str) -> int:
        tape = Tape()
        LayerTape(stage("1048k", *overrides)[0], tape).attention_backward()
        return tape.peak

    usual = attention()
    assert attention("train.deterministic=true") == usual + 8 * 4 * (32_768 + 128) * 16 * 128
    assert attention("attention.document_mask=intra") == usual + 15 * 4 * 128 * 16 * 128
    assert attention("attention.cp_comm_type=all_gather") > usual + 2 * 15 * 32_768 * 16 * 128 * 2


def test_advice_without_any_fit_names_what_would_help() -> None:
    work, cluster = stage("65k", "cluster=l40s-1x8")
    small = dataclasses.replace(cluster, memory_gib=Fact(4, "assumed", "test"))
    assert "more ranks" in advice(make_plan(work.on(Layout(tp=2, cp=4)), small))


def test_dealing_ranks_out_over_nodes_is_planned_to_cost_time() -> None:
    work, cluster = stage("1048k")
    slow = dataclasses.replace(cluster, nic_gbs=Fact(0.5, "assumed", "test"))
    work = work.on(Layout(tp=1, cp=8, dp=16, pp=4))
    good = make_plan(work, slow)
    bad = make_plan(work, slow, cyclic_order(512, 8))
    assert good.step.seconds.ring == 0
    assert bad.step.seconds.ring > 0
    assert "the ring waits" in bad.bottleneck


def test_short_rings_hide_what_one_long_ring_cannot() -> None:
    work, cluster = stage("1048k")
    rings, single = (make_plan(work.on(x), cluster) for x in (Layout(cp=32, dp=16), Layout(cp=512)))
    assert rings.step.forward.exposed == rings.step.backward.exposed == 0
    assert single.step.seconds.ring > rings.step_s
    # B >= 2*(K/H)*F/n: 4 GB/s hides a hop of the short ring, the long one needs sixteen times as much
    needed = [next(r.needed_gbs for r in p.ring if r.direction == "forward") for p in (rings, single)]
    assert needed[1] / needed[0] == pytest.approx(16, rel=0.1)


def test_needed_bandwidth_follows_the_closed_formula() -> None:
    work, cluster = stage("1048k")
    instant = dataclasses.replace(
        cluster, network_latency_us=Fact(0, "assumed", "t"), node_latency_us=Fact(0, "assumed", "t")
    )
    plan = make_plan(work.on(Layout(cp=32, dp=16)), instant)
    achieved = cluster.peak_flops("bf16") * cluster.attention_forward_efficiency.value
    formula = 2 * (8 / 32) * achieved / work.on(Layout(cp=32, dp=16)).local_tokens / 1e9
    assert plan.ring[0].needed_gbs == pytest.approx(formula, rel=1e-3)


def test_json_of_a_plan_names_neighbours_and_edges() -> None:
    work, cluster = stage("262k", "cluster=l40s-4x8")
    ranks = as_json(make_plan(work.on(Layout(cp=32)), cluster))["ranks"]
    assert [r["ring_right"] for r in ranks] == [*range(1, 32), 0]
    assert sum(r["ring_edge"] == "leaf" for r in ranks) == 4


def test_cluster_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: mine\nnic_gbs: {value: 3, tag: guessed, source: "x"}\n')
    with pytest.raises(ConfigError, match="guessed"):
        load_cluster(path)
    path.write_text("name: mine\nnic_speed: 3\n")
    with pytest.raises(ConfigError, match="nic_speed"):
        load_cluster(path)


def test_predicted_and_actual_stand_side_by_side() -> None:
    beside = Beside(plan_of(run_of(["+stage=65k"])), rank=0)
    found = beside.scalars(12.0, 2**30)
    assert found["step_seconds_actual"] == 12.0
    assert found["memory_MiB_actual"] == 1024
    assert beside.differences() == {}
    assert "s a step" in beside.summary()


def test_steps_of_a_shorter_window_cost_what_their_attention_costs() -> None:
    """Everything else of a step is the same: it has as many tokens, packed to the window."""
    work, cluster = stage("1048k")
    plain = make_plan(work, cluster)
    mixed = make_plan(dataclasses.replace(work, shorter=((8192, 4),)), cluster)
    (short,) = mixed.shorter
    own, other = dataclasses.asdict(mixed.step.seconds), dataclasses.asdict(short.step.seconds)
    assert other["attention"] == pytest.approx(own["attention"] * 8193 / (work.seq_length + 1))
    assert other["matmul"] == own["matmul"]
    assert mixed.step_s == plain.step_s == mixed.step_s_of(work.seq_length)
    seconds = short.step.seconds.total
    assert mixed.step_s_of(8192) == seconds < mixed.step_s / 2
    assert plain.wall_s - mixed.wall_s == pytest.approx(4 * (plain.step_s - seconds))
    assert mixed.memory == plain.memory
    assert f"4 of {work.steps} steps read sequences of 8,192 tokens" in report(mixed, "mixed")
    assert as_json(mixed)["shorter"] == [{"window": 8192, "steps": 4, "step_total_s": seconds}]


def test_the_plan_of_a_run_knows_the_windows_of_its_data(tmp_path: Path) -> None:
    make_mixed_folder(tmp_path / "data", {256: (3, 1), 64: (4, 1)}, {256: 3, 64: 1})
    run = run_of(["+stage=65k", "+scale=mini", f"data.path={tmp_path / 'data'}", "train.steps=10"])
    assert workload_of(run).shorter == ((64, 2),)
    tokens = {w: utilisation(workload_of(run), run.config.cluster, 1.0, w).tokens_per_second_per_gpu for w in (256, 64)}
    assert tokens[256] == tokens[64]
    assert utilisation(workload_of(run), run.config.cluster, 1.0, 64).mfu < plan_of(run).use.mfu * plan_of(run).step_s
