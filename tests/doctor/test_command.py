"""One command: parts fail alone, the report says what was seen, and what a GPU would add is listed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from megalong.doctor import command, parts
from megalong.doctor.part import Part
from megalong.doctor.ranks import Ranks
from megalong.doctor.result import Check
from megalong.runtime.ranks import RankFailed, RankPool

REPO = Path(__file__).parents[2]


@pytest.fixture
def pool(ranks: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's ranks are those of the tests."""
    monkeypatch.setattr("megalong.doctor.ranks.RankPool", lambda: ranks)
    monkeypatch.setattr(Ranks, "close", lambda self: None)


def dies(visit: object) -> list[Check]:
    import os

    visit.ranks.run(os._exit, 1, 11)  # type: ignore[attr-defined]
    return []


def test_a_part_that_crashes_fails_alone(
    pool: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    broken = Part("wires", "does a rank that dies take others with it?", dies)
    monkeypatch.setattr(parts, "PARTS", tuple(broken if p.name == "wires" else p for p in parts.PARTS))
    assert command.app(["machine", "wires", "kernels", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "FAILED: wires;" in said
    assert "rank 0 died" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert {p["name"]: p["state"] for p in report["parts"]} == {"machine": "note", "wires": "fail", "kernels": "pass"}
    assert report["failed"] == ["wires"]
    assert report["machine"]["cores"] >= 1
    assert "rank 0 died" in (tmp_path / "report.md").read_text()


def test_one_part_runs_by_itself_with_figures_limits_and_what_a_gpu_would_add(
    pool: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert command.app(["kernels", "--cpu", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    [part] = report["parts"]
    assert {c["state"] for c in part["checks"]} == {"pass", "not run"}
    assert all(c["limit"] for c in part["checks"] if c["state"] == "pass")
    assert all("2^31" in line or "cudnn" in line for line in report["on_a_gpu"])
    assert "queries of more than 2^31 elements" in capsys.readouterr().out
    text = (tmp_path / "report.md").read_text()
    assert "**No part failed.**" in text
    assert "| cpu_flash in float32, 11 tiles | pass |" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["heart"], "There is no part heart: choose of machine, wires"),
        (["kernels", "train.lrr=1"], "train.lrr"),
        (["kernels", "--ranks", "9", "--cpu"], "at most 8 CPU ranks"),
        (["kernels", "--out", "/proc/doctor"], "cannot be written|No such file"),
        (["--rank"], "No such option"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert command.app([*words, *out]) == 2
    said = capsys.readouterr().err
    assert any(option in said for option in says.split("|"))
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "report.md").exists()


def test_every_part_says_what_it_asks_and_what_a_gpu_adds() -> None:
    assert (
        *("machine", "wires", "kernels", "canary", "verify"),
        *("attention", "cluster", "step", "resume", "memory"),
    ) == parts.NAMES
    assert all(part.question.endswith("?") and part.on_gpu for part in parts.PARTS)
    assert all(name in command.HELP for name in parts.NAMES)


def rank_and_sum(fail: bool) -> tuple[int, float]:
    import torch

    if fail and dist.get_rank() == 1:
        raise ValueError("planted")
    x = torch.ones(1)
    dist.all_reduce(x)
    return dist.get_rank(), float(x)


@pytest.mark.long
def test_ranks_that_torchrun_starts_give_results_in_order_or_the_traceback(tmp_path: Path) -> None:
    ranks = Ranks("cuda", 2, tmp_path)
    assert ranks.started(rank_and_sum, 2, False) == [(0, 2.0), (1, 2.0)]
    with pytest.raises(RankFailed, match="planted"):
        ranks.started(rank_and_sum, 2, True, timeout_s=60)
    ranks.close()


@pytest.mark.long
def test_the_whole_round_on_the_cpu_passes_and_its_cluster_file_plans(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "tools/doctor.py", "--cpu", "--name", "mine", "--out", str(out)]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=290)
    report = json.loads((out / "report.json").read_text())
    # what is timed may be anything on a busy machine
    failed = [c for p in report["parts"] if p["name"] not in ("attention", "step") for c in p["checks"]]
    assert [c for c in failed if c["state"] == "fail"] == [], run.stdout + run.stderr
    assert [p["name"] for p in report["parts"] if p["error"]] == []
    assert len(report["parts"]) == 10
    plan = [sys.executable, "tools/plan.py", "+stage=65k", "+scale=mini", "gpus=4", f"cluster={out}/cluster/mine.yaml"]
    planned = subprocess.run(plan, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert planned.returncode == 0, planned.stderr
    assert "measured" in planned.stdout


def test_the_report_is_plain_json_whatever_the_machine_says(tmp_path: Path) -> None:
    from megalong.doctor.report import plain
    from megalong.machine.topo import parse_matrix
    from tests.machine import recordings

    links = parse_matrix(recordings.TOPO_FOUR)
    found = plain(dataclasses.replace(links))
    assert json.loads(json.dumps(found))["words"]["GPU0 GPU1"] == "PXB"
