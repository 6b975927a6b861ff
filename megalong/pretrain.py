"""Train one stage: `torchrun megalong/pretrain.py +stage=1048k [+scale=mini] [key=value ...]`.

Also runs as a single process (`python megalong/pretrain.py ...`) and as one task per GPU under Slurm. Settings:
conf/ and megalong/config/schema.py. Exit codes: megalong/runtime/errors.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# torchrun puts this folder first on the path, where our room names could hide other packages
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalong.runtime import console, launch
from megalong.runtime.errors import ConfigError
from megalong.runtime.watchdog import enter

if TYPE_CHECKING:  # imported where they are needed: what is wrong is said before torch is loaded
    from megalong.planning.plan import Plan
    from megalong.run import Run
    from megalong.training.claim import RunClaim
    from megalong.training.signals import StopRequest

HELP = """Train one stage of the recipe.

  torchrun --nproc-per-node N megalong/pretrain.py +stage=STAGE [+scale=mini] \\
      [init_from=DIR] [data.path=DIR] [run_dir=DIR] [key=value ...]

Example: python megalong/pretrain.py +stage=65k +scale=mini train.steps=3

Every key with type, unit and meaning: megalong/config/schema.py. Hydra's flags:

  --cfg job|hydra|all      print the settings that would be run with, and stop (`--cfg` alone: job)
  --config-dir DIR         stages, models, clusters of your own in DIR/stage, DIR/model, DIR/cluster
  -m, --multirun           one run after the other: python megalong/pretrain.py -m +stage=65k +scale=mini seed=1,2
  --info, --hydra-help, --version, --shell-completion install=bash
"""


def main(process: launch.Process) -> int:
    """Compose, check, launch, train.

    Returns:
        exit code.
    """
    console.speak_only_from(process.is_first)
    from megalong.recipe.command_line import answer, parse
    from megalong.recipe.compose import to_yaml
    from megalong.recipe.resolve import run_of

    line = parse(sys.argv[1:])
    if line.flags.multirun and process.launcher != "single":
        raise ConfigError(
            "a sweep starts one run after another, each with ranks of its own: python megalong/pretrain.py -m ..., "
            "with topology.tp, cp, pp, dp for runs of more than one rank."
        )

    def job() -> str:
        ranks = None if process.launcher == "single" else process.world_size
        return to_yaml(run_of(line.overrides, ranks).config)

    code = answer(line, HELP, job, first=process.is_first, folder_key="run_dir")
    if code is not None:
        return code
    enter("planning")
    run = run_of(line.overrides, process.world_size)
    from megalong.recipe.hardware import check_this_machine
    from megalong.recipe.parts import check_packages

    check_packages(run.config)
    check_this_machine(run.config, process.world_size)
    if process.is_first:
        from megalong.recipe.rope import theta_warning

        if told := theta_warning(run):
            console.warn(told)
    from megalong.training import signals

    stop = signals.StopRequest()
    from megalong.planning.choose import check_fits
    from megalong.planning.plan import plan_of

    plan = plan_of(run)
    check_fits(plan)
    if process.launcher == "torchrun":
        signals.follow_torchrun()
        stop.leave = lambda: None
        patience = signals.torchrun_patience_s(os.environ, signals.parents_command())
        if warning := signals.too_impatient(plan.step_s, plan.checkpoint_s, patience):
            console.warn(warning)
    from megalong.training.claim import RunClaim

    claim = RunClaim(run.run_dir) if process.is_first else None
    if claim is not None and stop.leave is not None:
        stop.leave = claim.withdraw
    try:
        return _train(process, run, plan, stop, claim)
    except BaseException:
        if claim is not None:
            claim.withdraw()
        raise


def _train(process: launch.Process, run: Run, plan: Plan, stop: StopRequest, claim: RunClaim | None) -> int:
    from megalong.planning.duration import checkpoint_bytes

    enter("importing torch and megatron-core")
    with console.gathered_notices("torch and megatron-core"):
        from megalong.recipe.parts import parts
        from megalong.runtime import device

        device.install()
        if run.config.train.deterministic:
            device.be_deterministic()
        from megalong.training.disk_space import check_disk_space
        from megalong.training.loop import StageRun
        from megalong.training.questions import check_haystack
        from megalong.training.sequences import open_data
        from megalong.training.start import Resumed, plan_start
    console.quiet_libraries()
    from megalong.topology.groups import initialize

    enter("reading what it starts from")
    start = plan_start(run)
    if not isinstance(start, Resumed):  # what has trained goes on without it
        check_haystack(run.config)
    check_disk_space(run, checkpoint_bytes(plan.work))
    announcements = [start.text]
    enter("opening the data")
    run, data = open_data(run, announcements, start.carried)
    config = run.config
    launch.init_process_group(process, plan.collective_timeout_s, config.train.heartbeat_s, config.train.join_s)
    stop.leave = None
    initialize(run.layout, config.attention.hierarchical_context_parallel_sizes)
    console.say(
        f"stage {config.stage.name}: window {run.seq_length:,} tokens, theta {run.theta:,.0f}, {run.layout} on "
        f"{process.world_size} ranks ({device.device().type}), {run.steps} steps of "
        f"{run.global_batch_size} sequences, {config.precision}, run_dir {run.run_dir}"
    )
    for line in [parts(config, device.capability()), *announcements]:
        console.say(line)
    return StageRun(run, plan, start, data, stop, claim).run()


def command() -> int:
    """`megalong-pretrain`; exit code."""
    return launch.run(main)


if __name__ == "__main__":
    sys.exit(command())
