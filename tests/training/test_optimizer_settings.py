"""The optimizer does what the configuration says, after a resume too."""

from pathlib import Path
from typing import Any

import pytest

from megalong.runtime.ranks import RankPool
from tests.training.runs import stage_run

FIRST = {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-8, "weight_decay": 0.3}
THEN = {"adam_beta1": 0.7, "adam_beta2": 0.8, "adam_eps": 1e-5, "weight_decay": 0.1}


def groups_after(run_dir: str, *overrides: str) -> list[dict[str, Any]]:
    """Settings of the parameter groups in the last step."""
    stage = stage_run(run_dir, *overrides)
    stage.run()
    return [{k: v for k, v in group.items() if k != "params"} for group in stage.state.optimizer.param_groups]


@pytest.mark.parametrize("layout", ["topology.tp=2", "topology.pp=2"])
def test_settings_of_the_checkpoint_do_not_come_back_with_its_moments(
    ranks: RankPool, tmp_path: Path, layout: str
) -> None:
    def run(settings: dict[str, float], *overrides: str) -> list[list[dict[str, Any]]]:
        given = [f"optimizer.{name}={value}" for name, value in settings.items()]
        return ranks.run(groups_after, 2, str(tmp_path), layout, *given, *overrides)

    run(FIRST, "train.stop_after=1")
    changed = ",".join(["train.lr", *(f"optimizer.{name}" for name in THEN)])
    for groups in run(THEN, "train.stop_after=2", "train.lr=7e-4", f"checkpoint.allow_changed=[{changed}]"):
        assert {group["lr"] for group in groups} == {7e-4}
        assert {group["weight_decay"] for group in groups} == {0.1, 0.0}
        assert {(*group["betas"], group["eps"]) for group in groups} == {(0.7, 0.8, 1e-5)}
