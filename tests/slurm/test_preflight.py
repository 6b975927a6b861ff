"""Bad nodes are told from good ones by what they report; nodes report what is really there."""

import json
import os
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from megalong.slurm.nodes import Gpu, NodeReport, measure, read_reports
from megalong.slurm.preflight import Needs, by_leaf, judge, leaf_of, main, natural, not_without
from tests.slurm.cluster import REPO

GPU = Gpu(free_gib=44, total_gib=44.5, tflops=200)
NEEDS = Needs(gpus=2, gpu_gib=40, host_gib=100, disk_gib=300)


def report(name: str, **other: object) -> NodeReport:
    sound = NodeReport(name, f"spine.leaf0.{name}", True, (GPU, GPU), disk_gib=900, host_gib=500, link_gbs=10)
    return replace(sound, **other)  # type: ignore[arg-type]


def verdict_on(**fault: object) -> dict[str, str]:
    """Reasons where node b of four has a fault."""
    nodes = ["a", "b", "c", "d"]
    return judge([report(n, **(fault if n == "b" else {})) for n in nodes], nodes, NEEDS).bad


def test_sound_nodes_are_all_good() -> None:
    assert verdict_on() == {}


def test_each_fault_names_its_node_and_what_met() -> None:
    slow = replace(GPU, tflops=150)
    assert verdict_on(gpus=(GPU,)) == {"b": "1 GPUs, 2 expected"}
    assert verdict_on(gpus=(GPU, slow)) == {"b": "GPU 1: 150.0 TFLOP/s, the median of the job is 200.0"}
    assert verdict_on(gpus=(replace(GPU, free_gib=3.0), GPU))["b"].startswith(
        "GPU 0: 3.0 of 44.5 GiB free, 40.0 needed"
    )
    assert verdict_on(gpus=(), gpu_error="GPU check failed: no driver") == {"b": "GPU check failed: no driver"}
    assert verdict_on(cuda=False, gpus=()) == {"b": "0 GPUs, 2 expected"}  # the others have a driver
    assert verdict_on(disk_gib=12.0) == {"b": "12.0 GiB of disk for run_dir, 300.0 needed"}
    assert verdict_on(host_gib=7.0) == {"b": "7.0 GiB of host memory available, 100.0 needed"}
    assert verdict_on(run_dir_error="not mounted") == {"b": "not mounted"}


def test_a_gpu_a_little_slower_than_the_rest_is_kept() -> None:
    assert verdict_on(gpus=(GPU, replace(GPU, tflops=165))) == {}


def test_without_gpus_anywhere_only_the_host_counts_unless_gpus_were_asked_for() -> None:
    reports = [report(n, cuda=False, gpus=()) for n in "ab"]
    assert judge(reports, ["a", "b"], NEEDS).bad == {}
    assert set(judge(reports, ["a", "b"], replace(NEEDS, gpus_required=True)).bad) == {"a", "b"}


def test_a_node_that_does_not_answer_is_bad_and_its_neighbour_is_not() -> None:
    nodes = ["a", "b", "c"]
    found = judge([report("a", link_gbs=None, link_error="no answer from b"), report("c")], nodes, NEEDS)
    assert found.bad == {"b": "did not answer"}


def test_both_links_of_a_bad_node_fail_and_one_link_alone_accuses_nobody() -> None:
    nodes = ["a", "b", "c", "d"]
    fails = {"link_gbs": None, "link_error": "timed out"}
    both = judge([report(n, **(fails if n in "ab" else {})) for n in nodes], nodes, NEEDS)
    assert list(both.bad) == ["b"]
    assert both.bad["b"].startswith("link: to c: timed out; from a")
    slow = judge([report(n, **({"link_gbs": 0.1} if n in "ab" else {})) for n in nodes], nodes, NEEDS)
    assert list(slow.bad) == ["b"]
    one = judge([report(n, **(fails if n == "a" else {})) for n in nodes], nodes, NEEDS)
    assert one.bad == {}
    assert one.warnings == ["link a -> b: timed out"]


@given(st.permutations([f"s{s}.l{leaf}.n{leaf * 4 + i}" for s in (0,) for leaf in (2, 10, 9) for i in range(4)]))
def test_nodes_of_a_leaf_are_neighbours_in_natural_order_whatever_the_list(addresses: list[str]) -> None:
    reports = [NodeReport(a.rpartition(".")[2], a) for a in addresses]
    order = [r.node for r in by_leaf(reports, 12)]
    assert order == [f"n{leaf * 4 + i}" for leaf in (2, 9, 10) for i in range(4)]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 10**6), st.data())
def test_nodes_left_out_empty_the_smallest_leaves(sizes: list[int], seed: int, data: st.DataObject) -> None:
    reports = [NodeReport(f"n{leaf}-{i}", f"top.l{leaf}.n{leaf}-{i}") for leaf, n in enumerate(sizes) for i in range(n)]
    random.Random(seed).shuffle(reports)
    take = data.draw(st.integers(1, len(reports)))
    kept = by_leaf(reports, take)
    assert len(kept) == take
    leaves, count = 0, 0
    for size in sorted(sizes, reverse=True):  # no choice of nodes touches fewer leaves
        leaves, count = leaves + (count < take), count + size
    assert len({leaf_of(r) for r in kept}) == leaves


def test_names_sort_by_their_numbers() -> None:
    assert sorted(["n10", "n9", "m1-2", "m1-10", "n1"], key=natural) == ["m1-2", "m1-10", "n1", "n9", "n10"]


def decide(tmp_path: Path, reports: list[NodeReport], take: int) -> int:
    lines = "\n".join(["pyxis: importing image", *(json.dumps(asdict(r)) for r in reports)])
    (tmp_path / "reports").write_text(lines)
    nodes = "--nodes=" + ",".join(r.node for r in reports)
    arguments = [str(tmp_path / "reports"), nodes, f"--take={take}", "--per-node=2", f"--out={tmp_path}"]
    assert read_reports(lines) == reports
    return main([*arguments, "--disk-gib=300"])


def test_the_hostfile_has_a_line_per_rank(tmp_path: Path) -> None:
    reports = [report("a"), report("b", topology="spine.leaf1.b"), report("c")]
    assert decide(tmp_path, reports, take=3) == 0
    assert (tmp_path / "hostfile").read_text().split() == ["a", "a", "c", "c", "b", "b"]


def test_a_bad_node_is_replaced_by_a_spare_or_else_excluded(tmp_path: Path) -> None:
    reports = [report("a"), report("b", disk_gib=1), report("c")]
    assert decide(tmp_path, reports, take=2) == 0
    assert (tmp_path / "hostfile").read_text().split() == ["a", "a", "c", "c"]
    assert decide(tmp_path, reports, take=3) == 3
    assert (tmp_path / "bad").read_text().split() == ["b"]


def test_a_job_starts_again_only_if_the_partition_has_enough_other_nodes() -> None:
    partition = ["a", "b", "c", "d"]
    assert not_without(["b"], [], partition, needed=3) is None
    assert not_without(["b"], [], None, needed=3) is None
    assert not_without(["b"], ["a"], partition, 3) == "without the bad nodes the partition has 2, and 3 are needed"
    assert not_without(["b"], ["b"], partition, 3) == "a node came back that had been excluded"


def test_ranks_meet_at_the_first_node_of_their_order(tmp_path: Path) -> None:
    reports = [report("b", topology="leaf1.b"), report("a", topology="leaf0.a")]
    (tmp_path / "reports").write_text("".join(json.dumps(asdict(r)) + "\n" for r in reports))
    nodes = ["--nodes=b=10.0.0.2,a=10.0.0.1", "--take=2", "--per-node=2"]
    out = tmp_path / "a folder"
    out.mkdir()
    assert main([str(tmp_path / "reports"), *nodes, f"--out={out}"]) == 0
    script = f'. "{out}/environment" && printf "%s\n" "$MASTER_ADDR" "$TORCH_FR_DUMP_TEMP_FILE"'
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["10.0.0.1", f"{out}/waiting-rank-"]


def test_what_most_nodes_lack_is_not_blamed_on_nodes(tmp_path: Path) -> None:
    assert decide(tmp_path, [report(n, disk_gib=1) for n in "abc"] + [report("d")], take=4) == 2
    assert not (tmp_path / "bad").exists()


def answers(folder: Path, listed: list[str], answering: list[str], fsize: int | None = None) -> dict[str, NodeReport]:
    """Real reports of processes that stand for nodes; those listed but not answering are dead."""
    token = folder / "token-1-0"
    token.touch()
    nodes = ",".join(f"{n}=127.0.0.1" for n in listed)
    command = [sys.executable, "-m", "megalong.slurm.nodes", f"--nodes={nodes}", f"--token={token}"]
    command += [f"--run-dir={folder}", f"--port={10000 + os.getpid() % 9000}", "--wait-s=5"]
    limit = ["prlimit", f"--fsize={fsize}"] if fsize else []
    running = {
        n: subprocess.Popen(
            [*limit, *command],
            env=os.environ | {"SLURMD_NODENAME": n, "SLURM_TOPOLOGY_ADDR": f"leaf.{n}"},
            cwd=REPO,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in answering
    }
    return {n: read_reports(process.communicate(timeout=60)[0])[0] for n, process in running.items()}


def test_nodes_measure_their_links_disk_and_memory(tmp_path: Path) -> None:
    found = answers(tmp_path, ["a", "b", "c"], ["a", "b", "c"])
    assert all(r.link_gbs and r.link_gbs > 0.01 and r.link_error is None for r in found.values())
    assert all(r.disk_gib > 0.1 and r.host_gib > 0.1 and r.run_dir_error is None for r in found.values())
    assert found["b"].topology == "leaf.b"


def test_a_node_names_a_neighbour_that_is_silent_and_a_folder_it_cannot_write(tmp_path: Path) -> None:
    found = answers(tmp_path, ["a", "dead"], ["a"], fsize=1024)["a"]
    assert found.link_gbs is None
    assert str(found.link_error).startswith("no answer from dead (127.0.0.1)")
    assert found.run_dir_error == f"{tmp_path} cannot be written: File too large"


def test_a_folder_without_the_jobs_token_is_not_the_shared_one(tmp_path: Path) -> None:
    nodes = {"here": "127.0.0.1"}
    found = measure(nodes, tmp_path / "token-1-0", tmp_path, port=1, wait_s=1)
    assert "not the folder that the job's other nodes see" in str(found.run_dir_error)
    assert found.link_gbs is None
    assert found.link_error is None
