"""Know memory, wires and hours before a GPU is booked: no GPU, no process group, an answer in seconds.

  python tools/plan.py +stage=1048k [cluster=l40s-64x8] [topology.cp=32] [train.recompute=full] ...
      output=json         everything as one JSON object, nothing else on stdout
      alternatives=10     the best layouts for the same devices, side by side
      picture=plan.png    rings over nodes, memory and time as bars
      gpus=64             devices to use; default: as many as the stage's layout
      order=cyclic        ranks dealt to nodes round robin instead of in blocks (to see what it costs)
  python tools/plan.py recipe [+stage=1048k] [output=json]
      a stage and all before it, beside the model card's minutes
  torchrun --nproc-per-node N tools/plan.py calibrate name=mine [gpus_per_node=N] [file=conf/cluster/mine.yaml]
      measures this machine and writes a cluster file

Example: python tools/plan.py +stage=1048k topology.cp=32 alternatives=10
Hydra's flags (--cfg, --info, --config-dir, -m) are the trainer's.
Exit codes: 0 it fits, 2 it does not (or the settings are wrong; megalong/runtime/errors.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megalong.runtime.called import as_called
from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR, ConfigError, UserError

OWN = {"output": ("text", "json"), "order": ("block", "cyclic")}
NUMBERS = ("alternatives", "gpus")


def main(arguments: list[str]) -> int:
    """Run one of the commands.

    Returns:
        exit code.
    """
    if arguments[:1] == ["calibrate"]:
        from megalong.commands.calibrate import main as calibrate

        return calibrate(arguments[1:])
    from megalong.recipe.command_line import answer, parse
    from megalong.recipe.compose import to_yaml
    from megalong.recipe.resolve import run_of

    own, words = _own_options(arguments or ["--help"])
    line = parse(words)
    code = answer(line, __doc__ or "", lambda: to_yaml(run_of(line.overrides, _gpus(own)).config))
    if code is not None:
        return code
    if line.words[:1] == ["recipe"]:
        return _recipe(own, [*line.added, *line.words[1:]])
    return _plan(own, line.overrides)


def _gpus(own: dict[str, str]) -> int | None:
    return int(own["gpus"]) if "gpus" in own else None


def _own_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Options of this tool, and what remains for the configuration.

    Raises:
        ConfigError: an option has no such value.
    """
    own, rest = {"output": "text", "order": "block"}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in (*OWN, *NUMBERS, "picture"):
            if key in OWN and value not in OWN[key]:
                raise ConfigError(f"{argument}: choose {key}={' or '.join(OWN[key])}.")
            if key in NUMBERS and not value.isdigit():
                raise ConfigError(f"{argument}: {key} is a whole number.")
            own[key] = value
        else:
            rest.append(argument)
    return own, rest


def _plan(own: dict[str, str], overrides: list[str]) -> int:
    from megalong.planning.choose import advice, candidates, ranking
    from megalong.planning.plan import make_plan
    from megalong.planning.report import alternatives_table, as_json, report
    from megalong.planning.workload import open_workload, workload_of
    from megalong.recipe.resolve import run_of
    from megalong.topology.placement import cyclic_order

    run = run_of(overrides, _gpus(own))
    config, work, cluster = run.config, workload_of(run), run.config.cluster
    slots = cyclic_order(work.layout.world_size, int(cluster.gpus_per_node.value)) if own["order"] == "cyclic" else None
    plan = make_plan(work, cluster, slots)
    others = []
    if int(own.get("alternatives", 0)):
        others = ranking(list(candidates(open_workload(run), cluster, work.layout.world_size)))
        others = others[: int(own["alternatives"])]
    title = f"stage {config.stage.name}, {config.model.name}"
    if "picture" in own:
        from megalong.evaluation.plan_picture import draw

        draw(plan, title, Path(own["picture"]))
    if own["output"] == "json":
        found = {"stage": config.stage.name, "model": config.model.name, "theta": run.theta, **as_json(plan)}
        found |= {"run_dir": config.run_dir, "keep": config.checkpoint.keep}
        found["alternatives"] = [_alternative(p) for p in others]
        found["advice"] = None if plan.fits else advice(plan)
        print(json.dumps(found))
    else:
        print(report(plan, title))
        if others:
            print(f"\nbest layouts of {work.layout.world_size} devices\n" + alternatives_table(others))
        if "picture" in own:
            print(f"\npicture: {own['picture']}")
        if not plan.fits:
            print(f"\n{plan.work.layout} does not fit. {advice(plan)}")
    return EXIT_OK if plan.fits else EXIT_USER_ERROR


def _alternative(plan) -> dict[str, object]:  # type: ignore[no-untyped-def]
    from dataclasses import asdict

    return {
        "layout": asdict(plan.work.layout),
        "fits": plan.fits,
        "step_total_s": plan.step_s,
        "memory_total_gib": plan.memory.total / 2**30,
        "tokens_per_second_per_gpu": plan.use.tokens_per_second_per_gpu,
        "mfu": plan.use.mfu,
    }


def _recipe(own: dict[str, str], overrides: list[str]) -> int:
    from megalong.planning.recipe import CLUSTERS, as_json, recipe_row, table
    from megalong.planning.workload import open_workload
    from megalong.recipe.resolve import run_of
    from megalong.recipe.stages import lineage

    def is_stage(word: str) -> bool:
        return word.lstrip("+").startswith("stage=")

    last = next((word.partition("=")[2] for word in reversed(overrides) if is_stage(word)), "1048k")
    overrides, rows = [word for word in overrides if not is_stage(word)], []
    for name in lineage(last):
        run = run_of([f"+stage={name}", *overrides])
        gpus = run.layout.world_size
        if gpus in CLUSTERS and not any(o.lstrip("+").startswith("cluster=") for o in overrides):
            run = run_of([f"+stage={name}", f"cluster={CLUSTERS[gpus]}", *overrides])
        minutes = run.config.stage.card_minutes
        if minutes is not None:
            rows.append(recipe_row(name, minutes, open_workload(run), run.config.cluster))
    print(json.dumps(as_json(rows)) if own["output"] == "json" else table(rows))
    return EXIT_OK


def command() -> int:
    """`megalong-plan`; exit code."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        print(f"\nplan: {as_called(str(error))}\n", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(command())
