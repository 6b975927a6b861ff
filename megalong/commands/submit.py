"""Submit jobs to Slurm, with nodes, time limit and signal lead from the plan: `megalong-submit`.

  megalong-submit stage [--dry-run] [sbatch options] +stage=65k init_from=DIR data.path=DIR run_dir=DIR [key=value ...]
  megalong-submit recipe [--dry-run] HF_DIR DATA_DIR RUNS_DIR [sbatch options] [key=value ...]    four stages, export
  megalong-submit export [--dry-run] [sbatch options] RUN_DIR HF_DIR
  megalong-submit data [--dry-run] [sbatch options] +stage=65k data.source=... data.out=... [key=value ...]

Example: megalong-submit stage --dry-run --account=lab +stage=65k init_from=Meta-Llama-3-8B run_dir=runs/65k
In a checkout slurm/stage.sbatch, recipe.sh, export.sbatch and data.sh are the same.

sbatch options (--name=value) win over what the plan says. What is a cluster's own comes from MEGALONG_* variables,
which the script carries along: docs/slurm.md lists them. Prints the job's number; --dry-run prints the script instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR
from megalong.slurm.submit import JOBS, Job, Options, Refused, data_job, export_job, stage_job, submit

CHAINS = ("recipe", "data")
"""Several jobs, submitted by a script of their own."""
KINDS: dict[str, Callable[[Options, list[str], Mapping[str, str]], Job]] = {
    "stage": stage_job,
    "export": export_job,
    "tokenize": partial(data_job, tokenizing=True),
    "lay-out": partial(data_job, tokenizing=False),
}


def main(arguments: list[str]) -> int:
    """Render, then print or submit.

    Returns:
        exit code.
    """
    kind, rest = arguments[0] if arguments else "", arguments[1:]
    if not rest or {"-h", "--help"} & set(arguments):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return EXIT_OK if {"-h", "--help"} & set(arguments) else EXIT_USER_ERROR
    if kind in CHAINS:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        return subprocess.run(["bash", str(JOBS / f"{kind}.sh"), *rest], env={**os.environ, "PATH": path}).returncode
    try:
        if kind not in KINDS:
            raise Refused(f"there is no job {kind!r}: choose one of {', '.join(('stage', 'export', *CHAINS))}")
        if short := [a for a in rest if a.startswith("-") and not a.startswith("--")]:
            raise Refused(f"{short[0]}: write sbatch options as --name=value")
        given: Options = {}
        for name, equals, value in (a.partition("=") for a in rest if a.startswith("--")):
            given[name] = value if equals else None
        dry = "--dry-run" in given
        given.pop("--dry-run", None)
        plain = [a for a in rest if not a.startswith("--")]
        job = KINDS[kind](given, plain, os.environ)
        output = Path((job.options["--output"] or "").replace("%%", "%")).parent
        print(job.render() if dry else submit(job.render(), output), end="" if dry else "\n")
    except Refused as reason:
        print(f"\nslurm: {reason}\n", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_OK


def command() -> int:
    """`megalong-submit`; exit code."""
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
