"""The doctor's command line: which parts, on what, and where the report goes."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Annotated

import typer

from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, UserError

HELP = """Says what this machine is, runs every claim of megalong that it allows, and measures a cluster file.

Give parts to run (none: all), and settings of the run whose shapes are measured, such as +stage=1048k topology.cp=8.

Parts: machine wires kernels canary verify attention cluster step resume memory.

OUT holds report.md, report.json, logs and cluster/NAME.yaml: tools/plan.py cluster=OUT/cluster/NAME.yaml plans with it.
Nothing of the machine is changed. Exit code 2 if a part failed.
"""


def main(
    words: Annotated[list[str] | None, typer.Argument(metavar="[PART|key=value]...", help="What to do.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report, cluster file and logs.")] = Path("outputs/doctor"),
    name: Annotated[str, typer.Option(help="Name of the cluster file; none: of this host.")] = "",
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave GPUs alone.")] = False,
    ranks: Annotated[int, typer.Option(help="Ranks; 0: every GPU, or 4 on the CPU.", min=0, max=64)] = 0,
) -> None:
    """Run the parts and write the report; the exit code is 2 if one failed."""
    if cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    wanted, settings = _understood(words or [])
    from megalong.doctor.part import CPU_RANKS, Round
    from megalong.doctor.parts import PARTS, attempt
    from megalong.doctor.ranks import Ranks
    from megalong.doctor.report import advice, left_out, lines, write
    from megalong.doctor.result import FAIL
    from megalong.machine.inventory import take
    from megalong.runtime.ranks import MAX_RANKS

    begun = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: {error.strerror}. Give a folder that can be written.") from error
    machine = take()
    gpus = _devices()
    if gpus and ranks > gpus:
        raise ConfigError(f"--ranks {ranks}: this machine has {gpus} GPUs; --cpu takes CPU ranks.")
    if not gpus and ranks > MAX_RANKS:
        raise ConfigError(f"--ranks {ranks}: at most {MAX_RANKS} CPU ranks.")
    device = "cuda" if gpus else "cpu"
    pool = Ranks(device, ranks or gpus or CPU_RANKS, out.resolve() / "logs")
    name = name or re.sub(r"[^A-Za-z0-9-]+", "-", machine.host).strip("-") or "here"
    visit = Round(machine, pool, out.resolve(), name, settings)
    parts, results = [part for part in PARTS if not wanted or part.name in wanted], []
    try:
        for part in parts:
            results.append(attempt(part, visit))
            print("\n".join(lines(results[-1])), flush=True)
    finally:
        pool.close()
    if visit.findings:
        print("\n" + "\n".join(advice(visit.findings)))
    if left := left_out(visit, parts):
        print("\non a GPU it would run\n" + "\n".join(f"  {line}" for line in left))
    seconds = time.monotonic() - begun
    report = write(visit, results, parts, seconds)
    failed = [result.name for result in results if result.state == FAIL]
    verdict = f"FAILED: {', '.join(failed)}" if failed else "no part failed"
    if visit.cluster_file.exists() and any(r.name == "cluster" for r in results):
        how = f"tools/plan.py gpus={pool.count} cluster=... +stage=..."
        print(f"\ncluster file: {visit.cluster_file}; plan with it: {how}")
    print(f"\n{verdict}; {seconds:.0f} s; report: {report}")
    raise typer.Exit(EXIT_USER_ERROR if failed else EXIT_OK)


def _understood(words: list[str]) -> tuple[list[str], list[str]]:
    """Parts and settings of a command line.

    Raises:
        ConfigError: a word is neither.
    """
    from megalong.doctor.parts import NAMES

    parts = [word for word in words if "=" not in word]
    unknown = [word for word in parts if word not in NAMES]
    if unknown:
        raise ConfigError(
            f"There is no part {', '.join(unknown)}: choose of {', '.join(NAMES)}; settings are key=value."
        )
    settings = [word for word in words if "=" in word]
    if settings:
        from megalong.recipe.resolve import run_of

        staged = settings if any(w.lstrip("+").startswith("stage=") for w in settings) else ["+stage=65k", *settings]
        run_of(staged)  # a mistake in them is told before anything is measured
    return parts, settings


def _devices() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def app(arguments: list[str]) -> int:
    """Run the command.

    Returns:
        exit code.
    """
    made = typer.Typer(add_completion=False, rich_markup_mode=None)
    made.command(help=HELP)(main)
    try:
        made(arguments, prog_name="doctor")
    except SystemExit as end:
        return int(end.code or 0)
    except UserError as error:
        typer.echo(f"\nmegalong: {error}\n", err=True)
        return error.exit_code
    return EXIT_OK
