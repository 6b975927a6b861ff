"""A step's time is told apart by phase, and the steps that are asked for are profiled on the ranks that are asked."""

import json
from pathlib import Path

import pytest

from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError
from megalong.runtime.ranks import RankPool
from megalong.training.phases import PHASES, shares
from tests.training.runs import outcome_of

STAGE = ["+stage=65k", "+scale=mini"]


def test_phases_add_up_and_the_step_asked_for_is_traced(ranks: RankPool, tmp_path: Path) -> None:
    said = ["topology.cp=2", "train.steps=3", "train.profile=[2]", "train.profile_ranks=[1]"]
    assert ranks.run(outcome_of, 2, str(tmp_path), *said) == ["done", "done"]
    [trace] = (tmp_path / "profile").iterdir()
    assert trace.name == "step2-rank1.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::_scaled_dot_product_flash_attention_for_cpu", "aten::mm"} <= names
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for record in steps:
        phases = record["phase_seconds"]
        assert tuple(phases) == PHASES
        assert all(seconds > 0 for seconds in phases.values())
        assert sum(phases.values()) == pytest.approx(record["seconds"])


def test_the_console_names_the_largest_share_first_and_no_trifles() -> None:
    assert shares({"data": 0.001, "other": 2.0, "attention": 7.999}) == "attention 80% other 20%"
    assert shares({}) == ""


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        (["train.profile=[2,9]", "train.steps=4"], "ends with step 4, before .9."),
        (["train.profile=[1]", "train.profile_ranks=[0,3]"], "there are 1 ranks, from 0; no .3."),
        (["train.profile=[0]"], "must be at least 1"),
    ],
)
def test_a_profile_that_would_never_be_written_is_refused(said: list[str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        run_of([*STAGE, "topology.cp=1", "topology.dp=1", *said], 1)
