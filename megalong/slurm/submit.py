"""What exactly is handed to Slurm? A job script of its own, rendered from the stage's plan."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOBS = (Path(__file__).resolve().parent / "jobs").resolve()
"""The scripts that do the work: a checkout's slurm/, or a folder of the installed package."""
PACKAGE = Path(__file__).resolve().parents[2]
"""The folder that holds megalong/."""
CHECKOUT = PACKAGE if JOBS.parent == PACKAGE else None
ARRAY = 64  # tasks of an array at most, where nobody says otherwise
CPUS = 8
MARGIN = 1.25  # on the planned time: a limit too long costs nothing, one too short a second wait in the queue
START_S = 900  # preflight, container, weights, evaluation

Options = dict[str, str | None]
"""sbatch options in order; None for those without a value."""


class Refused(Exception):
    """Why nothing is submitted."""


@dataclass(frozen=True)
class Job:
    """A complete script for sbatch."""

    title: list[str]
    options: Options
    variables: dict[str, str]
    body: str
    """File of `JOBS` that does the work."""
    arguments: list[str]

    def render(self) -> str:
        """The script; nothing is added when it is submitted."""
        lines = ["#!/usr/bin/env bash", *(f"# {line}" for line in self.title)]
        lines += [f"#SBATCH {n}" + ("" if v is None else f"={shlex.quote(v)}") for n, v in self.options.items()]
        lines += ["", *(f"export {name}={shlex.quote(value)}" for name, value in self.variables.items())]
        words = [f"exec bash {shlex.quote(str(JOBS / self.body))}", *map(shlex.quote, self.arguments)]
        return "\n".join([*lines, " \\\n  ".join(words)]) + "\n"


def stage_job(given: Options, settings: list[str], env: Mapping[str, str]) -> Job:
    """The job of one stage: nodes, time and signal lead from its plan.

    Raises:
        Refused: no run_dir, a cluster that only the job could see, or the planner refuses.
    """
    if not _setting(settings, "run_dir"):
        raise Refused("give run_dir=...: checkpoints, logs and the job's own notes lie there")
    if _setting(settings, "cluster") == "auto":
        raise Refused("cluster=auto reads the machine it runs on, and that is not the job's: name the cluster's file")
    asked, per_node = given.get("--nodes"), _per_node(given, env)
    plan = _plan(settings, int(asked) * per_node if asked and per_node else None)
    facts = {name: int(plan["cluster"]["facts"][name]["value"]) for name in ("nodes", "gpus_per_node")}
    if not per_node:
        per_node = facts["gpus_per_node"]
        plan = _plan(settings, int(asked) * per_node) if asked else plan
    elif per_node != facts["gpus_per_node"]:
        # plan and trainer go by what is said of the cluster
        nodes = math.ceil(facts["nodes"] * facts["gpus_per_node"] / per_node)
        settings = [*settings, f"cluster.gpus_per_node.value={per_node}", f"cluster.nodes.value={nodes}"]
        plan = _plan(settings, int(asked) * per_node if asked else None)
    run_dir = plan["run_dir"]
    settings = [s if _key(s) != "run_dir" else f"run_dir={run_dir}" for s in settings]  # as stage.sbatch reads it
    ranks = math.prod(plan["layout"].values())
    nodes, left = divmod(ranks, per_node)
    if left:
        raise Refused(
            f"{ranks} ranks do not fill nodes of {per_node}: give --ntasks-per-node=, --nodes= or topology.*="
        )
    lead = plan["signal_lead_s"]
    options: Options = _common(f"megalong-{plan['stage']}", env)
    options |= {"--nodes": str(nodes), "--ntasks-per-node": str(per_node), "--exclusive": None, "--mem": "0"}
    options |= _gpu_flag(given, env, per_node)
    options |= {"--time": _clock(MARGIN * plan["wall_minutes"] * 60 + START_S + lead), "--signal": f"USR1@{lead}"}
    options |= {"--requeue": None, "--open-mode": "append", "--output": _log(run_dir, "job")} | given
    spare = int(env.get("MEGALONG_SPARE_NODES") or 0)
    options["--nodes"] = str(nodes + spare)
    layout = " ".join(f"{axis}={size}" for axis, size in plan["layout"].items())
    title = [
        f"Stage {plan['stage']}, {plan['steps']} steps, {layout} on {nodes} x {per_node} ranks"
        + f" + {spare}" * (spare > 0),
        f"planned: {plan['step_total_s']:,.1f} s a step, {plan['checkpoint_s']:,.1f} s a checkpoint, "
        f"{plan['wall_minutes']:,.1f} minutes, {plan['gpu_hours']:,.1f} GPU hours",
    ]
    checkpoint_gib = plan["checkpoint_s"] * plan["cluster"]["facts"]["storage_gbs"]["value"] * 1e9 / 2**30
    floors = {
        "MEGALONG_SPARE_NODES": str(spare),
        "MEGALONG_GPU_GIB": f"{plan['memory_total_gib']:.1f}",
        "MEGALONG_HOST_GIB": f"{plan['host_memory_gib_per_node']:.1f}",
        "MEGALONG_DISK_GIB": f"{(plan['keep'] + 1) * checkpoint_gib:.1f}",
    }
    return Job(title, options, _carried(env) | floors, "stage.sbatch", settings)


def export_job(given: Options, arguments: list[str], env: Mapping[str, str]) -> Job:
    """The job that writes a run's newest checkpoint as a Hugging Face directory: one task, no GPU.

    Raises:
        Refused: not two folders.
    """
    if len(arguments) != 2:
        raise Refused("give RUN_DIR HF_DIR")
    run_dir, target = arguments
    options = _common("megalong-export", env)
    options |= {"--nodes": "1", "--ntasks": "1", "--time": "02:00:00", "--output": _log(run_dir, "export")}
    return Job(
        [f"{run_dir} as a Hugging Face directory: {target}"], options | given, _carried(env), "export.sbatch", arguments
    )


def data_job(given: Options, settings: list[str], env: Mapping[str, str], tokenizing: bool) -> Job:
    """The array that tokenizes the shards of a stage's data, or the job that lays them out.

    Raises:
        Refused: the tool does.
    """
    done = _megalong("prepare_data", "plan", *settings)
    if done.returncode:
        raise Refused(done.stderr.strip())
    plan: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    name = "tokenize" if tokenizing else "lay-out"
    options = _common(f"megalong-{name}-{plan['stage']}", env)
    options |= {"--nodes": "1", "--ntasks": "1", "--cpus-per-task": str(CPUS)}
    if tokenizing:
        options |= {"--array": f"0-{min(plan['tasks'], ARRAY) - 1}"}
    logs = str(Path(plan["out"]).parent)
    options |= {"--time": "24:00:00", "--requeue": None, "--output": _log(logs, name)}
    title = f"{plan['tasks']:,} shards, {plan['bytes'] / 1e9:,.1f} GB" if tokenizing else f"{plan['out']}"
    return Job([f"Data of stage {plan['stage']}: {title}"], options | given, _carried(env), "data.sbatch", settings)


def _common(name: str, env: Mapping[str, str]) -> Options:
    options: Options = {"--job-name": name}
    for key in ("account", "partition"):
        if value := env.get(f"MEGALONG_{key.upper()}"):
            options[f"--{key}"] = value
    return options


def _carried(env: Mapping[str, str]) -> dict[str, str]:
    image = env.get("MEGALONG_CONTAINER_IMAGE", "")
    found = {
        **({"MEGALONG_HOME": str(CHECKOUT)} if CHECKOUT else {"MEGALONG_HOME": "", "MEGALONG_JOBS": str(JOBS)}),
        "MEGALONG_PYTHON": env.get("MEGALONG_PYTHON") or ("python" if image else sys.executable),
    }
    if wait := env.get("MEGALONG_NEIGHBOUR_S"):
        found["MEGALONG_NEIGHBOUR_S"] = wait
    if image:
        found |= {
            "MEGALONG_CONTAINER_IMAGE": image,
            "MEGALONG_CONTAINER_MOUNTS": env.get("MEGALONG_CONTAINER_MOUNTS", ""),
        }
    return found


def _per_node(given: Options, env: Mapping[str, str]) -> int:
    """Ranks per node where somebody says so; 0: as the plan's cluster has it."""
    for text in (
        given.get("--ntasks-per-node"),
        given.get("--gpus-per-node"),
        given.get("--gres"),
        env.get("MEGALONG_GPUS_PER_NODE"),
    ):
        if text:
            return int(text.rpartition(":")[2])
    return 0


def _gpu_flag(given: Options, env: Mapping[str, str], per_node: int) -> Options:
    """Clusters differ in how GPUs are asked for: --gpus-per-node=8, --gres=gpu:8, or not at all."""
    flag = env.get("MEGALONG_GPU_FLAG") or "--gpus-per-node"
    if flag == "none" or {"--gres", "--gpus-per-node", "--gpus"} & given.keys():
        return {}
    name, _, kind = flag.partition("=")
    return {name: f"{kind}:{per_node}" if kind else str(per_node)}


def _plan(settings: list[str], ranks: int | None) -> dict[str, Any]:
    done = _megalong("plan", *settings, "output=json", *([f"gpus={ranks}"] if ranks else []))
    if done.returncode:
        advice = json.loads(done.stdout)["advice"] if done.stdout else done.stderr.strip()
        raise Refused(f"the plan does not fit. {advice}" if done.stdout else advice.removeprefix("plan: "))
    plan: dict[str, Any] = json.loads(done.stdout)
    return plan


def _megalong(command: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of this very package."""
    path = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
    called = [sys.executable, "-P", "-m", f"megalong.commands.{command}", *words]
    return subprocess.run(called, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def _setting(settings: list[str], key: str) -> str:
    """The last value that is given for a key; empty if none is."""
    return next((s.partition("=")[2] for s in reversed(settings) if _key(s) == key), "")


def _key(setting: str) -> str:
    return setting.partition("=")[0].lstrip("+")


def _log(run_dir: str, name: str) -> str:
    """Where Slurm writes what a job says; to Slurm, % begins a pattern."""
    return f"{run_dir.replace('%', '%%')}/logs/{name}-%j.log"


def _clock(seconds: float) -> str:
    """Slurm's hours, rounded up to ten minutes."""
    minutes = math.ceil(seconds / 600) * 10
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def submit(script: str, logs: Path) -> str:
    """Hand a script to Slurm; a copy of it goes beside the logs.

    Returns:
        the job's number.

    Raises:
        Refused: sbatch does.
    """
    if shutil.which("sbatch") is None:
        raise Refused("there is no sbatch on PATH: submit from a machine of the cluster; --dry-run prints the script")
    logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr.strip())
    job = done.stdout.strip().partition(";")[0]
    (logs / f"job-{job}.sbatch").write_text(script, encoding="utf-8")
    return job
