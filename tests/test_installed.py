"""What `pip install` leaves has all of a checkout: settings, Slurm scripts, commands; it plans, trains, submits."""

import json
import sys
import zipfile
from pathlib import Path

from tests.installing import REPO, run

TINY = ("model.num_hidden_layers=1", "train.steps=2", "train.global_batch_size=1", "data.eval_sequences=1")
LINKS = {"conf": "megalong/conf", "slurm": "megalong/slurm/jobs"}


def test_a_wheel_has_every_module_and_the_checkouts_settings_and_scripts_byte_for_byte(
    wheels: tuple[Path, Path],
) -> None:
    expected = {str(p.relative_to(REPO)): p.read_bytes() for p in (REPO / "megalong").glob("**/*.py")}
    expected |= {
        f"{inside}/{p.relative_to(REPO / ours)}": p.read_bytes()
        for ours, inside in LINKS.items()
        for p in (REPO / ours).glob("**/*")
        if p.is_file()
    }
    expected["megalong/evaluation/texts/haystack.txt"] = (REPO / "megalong/evaluation/texts/haystack.txt").read_bytes()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found = {n: archive.read(n) for n in archive.namelist() if ".dist-info/" not in n}
        assert found == expected


def test_what_is_installed_plans_and_trains_from_another_folder(installed: Path, tmp_path: Path) -> None:
    found = run(sys.executable, "-c", "import megalong; print(megalong.__file__)", cwd=tmp_path, path=installed)
    assert Path(found.strip()).parents[1] == installed
    plan = run(
        installed / "bin/megalong-plan", "+stage=65k", "+scale=mini", "output=json", cwd=tmp_path, path=installed
    )
    assert json.loads(plan)["stage"] == "65k"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    words = ("+stage=65k", "+scale=mini", "run_dir=run", *TINY)
    run(*torchrun, "-m", "megalong.pretrain", *words, cwd=tmp_path, path=installed)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]


def test_a_job_is_submitted_with_the_scripts_and_the_python_that_are_installed(installed: Path, tmp_path: Path) -> None:
    words = ("+stage=65k", "+scale=mini", "topology.cp=2", "run_dir=run")
    submit = (installed / "bin/megalong-submit", "stage", "--dry-run", "--ntasks-per-node=1", *words)
    script = run(*submit, cwd=tmp_path, path=installed)
    assert f"exec bash {installed}/megalong/slurm/jobs/stage.sbatch " in script
    assert f"export MEGALONG_HOME=''\nexport MEGALONG_JOBS={installed}/megalong/slurm/jobs\n" in script
    assert f"export MEGALONG_PYTHON={sys.executable}\n" in script
    assert str(REPO) not in script.replace(sys.executable, "")
