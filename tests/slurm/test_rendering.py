"""What would be submitted, word for word: dry runs against the files in golden/, and what follows from the plan.

After a change that is meant: `python -m tests.slurm.test_rendering` writes the files anew; read the difference.
"""

import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, REPO

GOLDEN = Path(__file__).parent / "golden"
FIXED = ("--time=10:00:00", "--signal=USR1@600")  # the planner's figures have tests of their own
STAGE = ("slurm/stage.sbatch", "--dry-run", *FIXED)
FULL = ("init_from=runs/524k", "data.path=data/1048k", "run_dir=runs/1048k")
CONTAINER = {
    "MEGALONG_CONTAINER_IMAGE": "/images/megalong.sqsh",
    "MEGALONG_CONTAINER_MOUNTS": "/data:/data,/scratch:/scratch",
}
CASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "stage_1048k": ((*STAGE, "+stage=1048k", *FULL), {}),
    "stage_gres_container_spare": (
        (*STAGE, "--qos=long", "+stage=1048k", *FULL),
        {
            "MEGALONG_ACCOUNT": "lab",
            "MEGALONG_PARTITION": "gpu",
            "MEGALONG_GPU_FLAG": "--gres=gpu:l40s",
            "MEGALONG_SPARE_NODES": "2",
            **CONTAINER,
        },
    ),
    "stage_four_gpus_a_node": ((*STAGE, "--gpus-per-node=4", "+stage=65k", "init_from=hf", "run_dir=a folder/65k"), {}),
    "export": (("slurm/export.sbatch", "--dry-run", "--account=lab", "runs/1048k", "runs/hf"), {}),
    "recipe": (("slurm/recipe.sh", "--dry-run", "Meta-Llama-3-8B", "data", "runs", "--account=lab", *FIXED), {}),
    "recipe_mini_four_nodes": (
        ("slurm/recipe.sh", "--dry-run", "-", "-", "runs", "--nodes=4", "--ntasks-per-node=1", "+scale=mini", *FIXED),
        {"MEGALONG_GPU_FLAG": "none", "MEGALONG_PYTHON": "python3.11"},
    ),
}


def run(command: tuple[str, ...], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEGALONG_", "SLURM_", "SBATCH_"))}
    return subprocess.run(
        command, cwd=REPO, env=clean | {"PATH": PATH} | env, capture_output=True, text=True, timeout=60
    )


def rendered(name: str) -> str:
    """A dry run, with this machine's paths and the planner's figures taken out."""
    done = run(*CASES[name])
    assert done.returncode == 0, done.stderr
    text = re.sub(r"(MEGALONG_PYTHON=)/\S+", r"\1PYTHON", done.stdout).replace(str(REPO), "/megalong")
    text = re.sub(r"^# planned: .*", "# planned: ...", text, flags=re.MULTILINE)
    return re.sub(r"(MEGALONG_\w+_GIB=)[\d.]+", r"\1...", text)


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_what_the_golden_file_has(name: str) -> None:
    expected, found = (GOLDEN / f"{name}.txt").read_text(), rendered(name)
    assert found == expected, "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), lineterm=""))


def test_all_scripts_are_valid_bash(tmp_path: Path) -> None:
    scripts = [*(REPO / "slurm").glob("*.sh"), *(REPO / "slurm").glob("*.sbatch")]
    for name in CASES:
        for i, text in enumerate(re.split(r"^### .*\n", (GOLDEN / f"{name}.txt").read_text(), flags=re.MULTILINE)):
            scripts.append(tmp_path / f"{name}-{i}")
            scripts[-1].write_text(text)
    assert len(scripts) > 12
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_scripts_stay_short_enough_to_be_read_and_edited() -> None:
    lengths = {p.name: len(p.read_text().splitlines()) for p in (REPO / "slurm").iterdir() if p.is_file()}
    assert {name: length for name, length in lengths.items() if length > 60} == {}
    assert "stage.sbatch" in lengths


@pytest.mark.parametrize("stage", ["65k", "262k", "524k", "1048k"])
def test_time_and_signal_lead_follow_from_the_plan(stage: str) -> None:
    text = run(("slurm/stage.sbatch", "--dry-run", f"+stage={stage}", "run_dir=runs/a"), {}).stdout
    plan = json.loads(run((sys.executable, "tools/plan.py", f"+stage={stage}", "output=json"), {}).stdout)
    hours, minutes = map(int, re.findall(r"--time=(\d+):(\d+):00", text)[0])
    lead = int(re.findall(r"--signal=USR1@(\d+)", text)[0])
    assert 60 + plan["step_total_s"] + plan["checkpoint_s"] < lead < 3600  # the signal may come a minute early
    assert 1.2 * plan["wall_minutes"] + lead / 60 < hours * 60 + minutes < 1.5 * plan["wall_minutes"] + lead / 60 + 60
    assert f"--nodes={len({r['node'] for r in plan['ranks']})}\n" in text


def test_nodes_that_are_asked_for_are_what_an_automatic_layout_is_planned_for() -> None:
    text = run(("slurm/stage.sbatch", "--dry-run", "--nodes=2", "+stage=65k", "topology=auto", "run_dir=a"), {}).stdout
    layout = re.search(r"tp=(\d+) cp=(\d+) pp=(\d+) dp=(\d+) on 2 x 8 ranks", text)
    assert layout is not None, text
    assert math.prod(map(int, layout.groups())) == 16
    assert "#SBATCH --nodes=2\n" in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("+stage=65k",), "give run_dir="),
        (("+stage=66k", "run_dir=a"), "There is no stage/66k"),
        (("--nodes=3", "+stage=65k", "run_dir=a"), "wants 8 GPUs"),
        (("--ntasks-per-node=3", "+stage=65k", "run_dir=a"), "8 ranks do not fill nodes of 3"),
        (("+stage=1048k", "topology.cp=4", "run_dir=a"), "does not fit"),
        (("-N4", "+stage=65k", "run_dir=a"), "--name=value"),
        (("+stage=65k", "run_dir=a", "+cluster=auto"), "name the cluster's file"),
        (("+stage=65k", "run_dir=a", "+train.lrr=3"), "no setting 'train.lrr'"),
    ],
)
def test_what_cannot_run_is_refused_before_it_is_submitted(arguments: tuple[str, ...], reason: str) -> None:
    done = run(("slurm/stage.sbatch", *arguments), {})
    assert done.returncode == 2
    assert reason in done.stderr


def test_the_job_and_its_log_get_the_run_dir_that_the_trainer_will_use() -> None:
    words = ("+stage=65k", "+run_dir='50% of ${stage.name}'", "checkpoint.keep=3")
    text = run((*STAGE, *words), {}).stdout
    assert "#SBATCH --output='50%% of 65k/logs/job-%j.log'" in text  # to Slurm, % begins a pattern
    assert "'run_dir=50% of 65k'" in text


def test_the_recipe_says_how_it_is_used() -> None:
    done = run(("slurm/recipe.sh",), {})
    assert done.returncode == 2
    assert "HF_DIR DATA_DIR RUNS_DIR" in done.stderr


if __name__ == "__main__":
    for each in CASES:
        (GOLDEN / f"{each}.txt").write_text(rendered(each))
