"""Where Python is in an image only, a job still judges nodes and endings, and requeues even when the image is gone."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster
from tests.slurm.stages import STEPS, log_of, steps_of, submit

pytestmark = pytest.mark.long

NAME = "python-of-the-image"
SRUN = """#!/usr/bin/env bash
# srun as pyxis extends it: in a step with an image, and nowhere else, the image's programs are there
words=() inside=
for word in "$@"; do case $word in --container-*) inside=yes ;; *) words+=("$word") ;; esac done
[ -z "$inside" ] || export PATH={image}:$PATH
exec {srun} "${{words[@]}}"
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A Python that only steps with an image can find."""
    python = tmp_path / "image" / NAME
    srun = tmp_path / "host" / "srun"
    for path, text in (
        (python, f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'),
        (srun, SRUN.format(image=python.parent, srun=shutil.which("srun", path=PATH))),
    ):
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
    return python


def env_of(image: Path) -> dict[str, str]:
    host = image.parents[1] / "host"
    return {"MEGALONG_CONTAINER_IMAGE": "image.sqsh", "MEGALONG_PYTHON": NAME, "PATH": f"{host}:{PATH}"}


def test_nodes_and_endings_are_judged_in_the_image(cluster: Cluster, tmp_path: Path, image: Path) -> None:
    job = submit(cluster, tmp_path / "run", f"data.path={tmp_path}/none", nodes=2, env=env_of(image))
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    log = log_of(tmp_path / "run", job)
    assert "2 of 2 nodes fit" in log
    assert "was the first to end with code 2" in log


def test_what_was_saved_goes_on_though_the_image_does_not_start_again(
    cluster: Cluster, tmp_path: Path, image: Path
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, run_dir, f"train.steps={STEPS}", nodes=1, env=env_of(image))
    cluster.wait(lambda: len(steps_of(run_dir)) >= 3, 120, "three steps")
    image.rename(image.with_suffix(".gone"))
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(lambda: cluster.job(job)["Restarts"] == "1", 60, "the job to be requeued")
    image.with_suffix(".gone").rename(image)
    ended = cluster.ended(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert "how it ended could not be judged" in log_of(run_dir, job)
    assert [s["step"] for s in steps_of(run_dir)] == list(range(1, STEPS + 1))
