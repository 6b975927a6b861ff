"""One Slurm cluster for all tests of this folder, and one run that nothing disturbs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.stages import STEPS, submit


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        started = Cluster(Path(folder))
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run_dir of a run on all four nodes that went from the first step to the last."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "a folder"
    job = cluster.ended(submit(cluster, run_dir, f"train.steps={STEPS}"))
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0")
    return run_dir
