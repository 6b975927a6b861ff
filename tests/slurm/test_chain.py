"""The recipe's chain under a real Slurm: four stages and an export, and nothing after a stage that failed."""

import re
from pathlib import Path

import pytest

from megalong.convert.compare import tensor_differences
from megalong.convert.weights import open_weights
from tests.slurm.cluster import Cluster
from tests.slurm.stages import ENV, SMALL

pytestmark = pytest.mark.long


def start(cluster: Cluster, data: str, runs: Path, *more: str, installed: Path | None = None) -> dict[str, str]:
    """Name -> job number of what the recipe submits, from the checkout or from a folder with the installed package."""
    words = ("-", data, str(runs), "--nodes=2", *SMALL, *more)
    if installed is None:
        said = cluster.run("slurm/recipe.sh", *words, env=ENV)
    else:
        env = ENV | {"PYTHONPATH": str(installed)}
        said = cluster.run(str(installed / "bin/megalong-submit"), "recipe", *words, env=env, cwd=runs)
    return dict(re.findall(r"(\w+): job (\d+)", said))


@pytest.mark.timeout(600)
def test_the_chain_trains_four_stages_and_exports_from_what_is_installed(
    cluster: Cluster, tmp_path: Path, installed: Path
) -> None:
    jobs = start(cluster, "-", tmp_path, "train.steps=2", "train.global_batch_size=2", installed=installed)
    assert list(jobs) == ["65k", "262k", "524k", "1048k", "export"]
    for name, job in jobs.items():
        ended = cluster.ended(job)
        assert (name, ended["JobState"], ended["ExitCode"]) == (name, "COMPLETED", "0:0")
    with open_weights(tmp_path / "1048k") as run, open_weights(tmp_path / "hf") as export:
        assert export.model.max_position_embeddings == 4096
        assert list(tensor_differences(run, export)) == []


def test_a_failed_stage_cancels_the_rest(cluster: Cluster, tmp_path: Path) -> None:
    jobs = start(cluster, str(tmp_path / "no-data"), tmp_path / "runs")
    ends = {name: cluster.ended(job) for name, job in jobs.items()}
    assert (ends["65k"]["JobState"], ends["65k"]["ExitCode"], ends["65k"]["Restarts"]) == ("FAILED", "2:0", "0")
    assert {ends[name]["JobState"] for name in jobs if name != "65k"} == {"CANCELLED"}
    assert not (tmp_path / "runs" / "262k" / "checkpoints").exists()
