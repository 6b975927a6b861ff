"""Train one stage: `torchrun megalong/pretrain.py +stage=1048k [+scale=mini] [key=value ...]`.

Also runs as a single process (`python megalong/pretrain.py ...`) and as one task per GPU under Slurm. Settings:
conf/ and megalong/config/schema.py. Exit codes: megalong/runtime/errors.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

# torchrun puts this folder first on the path, where our room names could hide other packages
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalong.runtime import console, launch

HELP = """Train one stage of the recipe.

  torchrun --nproc-per-node N megalong/pretrain.py +stage=STAGE [+scale=mini] \\
      [init_from=DIR] [data.path=DIR] [run_dir=DIR] [key=value ...]

Every key with type, unit and meaning: megalong/config/schema.py; `--cfg` prints the resolved settings and stops.
"""


def main(process: launch.Process) -> int:
    """Compose, check, launch, train.

    Returns:
        exit code.
    """
    arguments = [a for a in sys.argv[1:] if a not in ("--cfg", "-h", "--help")]
    console.speak_only_from(process.is_first)
    if {"-h", "--help"} & set(sys.argv[1:]):
        console.say(HELP)
        return 0
    from megalong.recipe.compose import compose, to_yaml

    config = compose(arguments, None if "--cfg" in sys.argv[1:] else process.world_size)
    if "--cfg" in sys.argv[1:]:
        console.say(to_yaml(config))
        return 0
    from megalong.training.signals import StopRequest

    stop = StopRequest()
    from megalong.planning.choose import check_fits
    from megalong.planning.duration import checkpoint_bytes
    from megalong.planning.plan import plan_of

    plan = plan_of(config)
    check_fits(plan)
    with console.gathered_notices("torch and megatron-core"):
        from megalong.runtime import device

        device.install()
        from megalong.training.loop import StageRun
        from megalong.training.room import check_room
        from megalong.training.start import plan_data, plan_start
    console.quiet_libraries()
    from megalong.recipe.layout import layout_of
    from megalong.topology.groups import initialize

    start = plan_start(config)
    check_room(config, checkpoint_bytes(plan.work))
    announcements = [start.text]
    train, held_out = plan_data(config, announcements)
    launch.init_process_group(process, plan.collective_timeout_s, config.train.heartbeat_s, config.train.join_s)
    initialize(layout_of(config), config.attention.hierarchical_context_parallel_sizes)
    stage = config.stage
    console.say(
        f"stage {stage.name}: window {stage.seq_length:,} tokens, theta {stage.theta:,.0f}, {layout_of(config)} on "
        f"{process.world_size} ranks ({device.device().type}), {config.train.steps} steps of "
        f"{config.train.global_batch_size} sequences, {config.precision}, run_dir {config.run_dir}"
    )
    for line in announcements:
        console.say(line)
    return StageRun(config, start, train, held_out, stop).run()


if __name__ == "__main__":
    sys.exit(launch.run(main))
