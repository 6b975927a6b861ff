"""The sbatch templates parse, and the chain hands every stage the one before."""

import shlex
import subprocess
from pathlib import Path

REPO = Path(__file__).parents[2]


def test_the_templates_are_valid_bash() -> None:
    for script in (REPO / "slurm").iterdir():
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_chain_starts_each_stage_from_the_one_before() -> None:
    command = ["slurm/recipe.sh", "--dry-run", "hf", "data", "runs", "--account=lab"]
    out = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout.splitlines()
    jobs = [shlex.split(line) for line in out[:4]]
    assert [j[-4] for j in jobs] == ["+stage=65k", "+stage=262k", "+stage=524k", "+stage=1048k"]
    assert [j[-3] for j in jobs] == ["init_from=hf", "init_from=runs/65k", "init_from=runs/262k", "init_from=runs/524k"]
    assert all("--account=lab" in j and "--kill-on-invalid-dep=yes" in j for j in jobs)
    assert not any(a.startswith("--dependency") for a in jobs[0])
    assert all("--dependency=afterok:" in " ".join(j) for j in jobs[1:])


def test_without_arguments_the_chain_says_how_it_is_used() -> None:
    run = subprocess.run(["slurm/recipe.sh"], cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 2
    assert "HF_DIR DATA_DIR RUNS_DIR" in run.stderr
