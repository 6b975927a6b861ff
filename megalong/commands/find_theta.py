"""Find the rotary base of a stage by measurement.

  torchrun --nproc-per-node 8 tools/find_theta.py +stage=262k init_from=DIR data.path=DIR budget=TOKENS \\
      [out=outputs/theta-262k] [candidates=7] [seeds=2] [weight=1.0] [key=value ...]

Example: torchrun --nproc-per-node 8 tools/find_theta.py +stage=65k init_from=HF_DIR data.path=data/65k budget=200000000

All other words are the trainer's, with Hydra's flags (--cfg, --info, --config-dir). A search that was killed goes on
where it was; `out` receives trials.jsonl, report.json, report.txt, loss_against_theta.png and
stage/<stage>-found.yaml, with which the trainer starts by `--config-dir <out> +stage=<stage>-found`. How it searches:
megalong/evaluation/theta_search.py, docs/theta.md.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalong.runtime import console, launch
from megalong.runtime.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megalong.evaluation.theta_search import Found, Trial
    from megalong.run import Run

OWN = {"budget": "", "out": "", "candidates": "7", "seeds": "2", "weight": "1.0"}


def main(process: launch.Process) -> int:
    """Search; returns the exit code."""
    console.speak_only_from(process.is_first)
    from megalong.recipe.command_line import answer, parse
    from megalong.recipe.compose import to_yaml
    from megalong.recipe.resolve import run_of

    words = sys.argv[1:] or ["--help"]
    own = OWN | {k: v for k, _, v in (w.partition("=") for w in words) if k in OWN}
    line = parse([w for w in words if w.partition("=")[0] not in OWN])
    if line.flags.multirun:
        raise ConfigError("a sweep makes several searches: start find_theta once for each, with an out= of its own.")
    ranks = None if process.launcher == "single" else process.world_size
    code = answer(line, __doc__ or "", lambda: to_yaml(run_of(line.overrides, ranks).config), first=process.is_first)
    if code is not None:
        return code
    run = run_of(line.overrides, process.world_size)
    tokens, count, seeds = (_whole(own, name) for name in ("budget", "candidates", "seeds"))
    if count < 3:
        raise ConfigError(f"candidates={count}: at least 3 thetas are compared.")
    if run.config.init_from is None:
        raise ConfigError("init_from is missing: the weights that the stage starts from decide which theta they take.")
    with console.gathered_notices("torch and megatron-core"):
        from megalong.runtime import device

        device.install()
        from megalong.training.sequences import open_data
        from megalong.training.start import Resumed, plan_start
        from megalong.training.theta_trials import Trials
    console.quiet_libraries()
    from megalong.evaluation.theta_search import Search, candidates, plan_schedule
    from megalong.planning.plan import plan_of
    from megalong.rope.theta import RotaryPoint
    from megalong.topology.groups import initialize

    # its own folder, so that a run of the stage itself is neither resumed nor in the way
    out = Path(own["out"] or f"outputs/theta-{run.config.stage.name}")
    run = replace(run, run_dir=out / "no-run")
    start = plan_start(run)
    assert not isinstance(start, Resumed)
    told: list[str] = []
    run, data = open_data(run, told, whole=False)
    if data.held_out is None:
        raise ConfigError("data.eval_sequences=0: thetas are compared on held-out sequences. Ask for at least 1.")
    base = RotaryPoint(run.model.rope_theta, run.model.max_position_embeddings)
    thetas = candidates(base, run.before, run.seq_length, run.model.head_dim, run.config.stage.theta_factor, count)
    trials = Trials(run, start, data)
    budget = trials.budget(tokens)
    schedule = plan_schedule(len(thetas), seeds, budget)
    earlier = _earlier(out, run, own, [asdict(schedule), thetas])
    launch.init_process_group(process, plan_of(run).collective_timeout_s, run.config.train.heartbeat_s)
    initialize(run.layout, run.config.attention.hierarchical_context_parallel_sizes)
    for text in [start.text, *told]:
        console.say(text)
    cost = schedule.cost(budget)
    console.say(
        f"{len(thetas)} thetas from {thetas[0]:,.0f} to {thetas[-1]:,.0f}; rounds {list(schedule.rounds)}, "
        f"{schedule.finalists} finalists of {schedule.steps} steps, {seeds} seeds: {cost:,} of {tokens:,} tokens"
        + (f"; {len(earlier)} measurements are there already" if earlier else "")
    )
    begun, before = time.monotonic(), sum(t.tokens for t in earlier)
    spent = before

    def keep(trial: Trial) -> None:
        nonlocal spent
        spent += trial.tokens
        if process.is_first:
            with (out / "trials.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
        left = (time.monotonic() - begun) / (spent - before) * max(0, cost - spent)
        scores = trial.scores
        needle = "" if scores.needle is None else f", needle {scores.needle:.0%}"
        console.say(
            f"theta {trial.theta:>16,.0f}  {trial.steps:3} steps  seed {trial.seed}  last quarter "
            f"{scores.last_quarter:.4f}, short {scores.short:.4f}{needle}  |  {spent:,} tokens, ETA {left:.0f} s"
        )

    search = Search(trials, budget, run.config.seed, earlier, keep, float(own["weight"]))
    found = search.run(thetas, schedule, run.seq_length, thetas[0], trials.own_short_loss())
    if process.is_first:
        _report(found, run, out)
    return 0


def _whole(own: dict[str, str], name: str) -> int:
    try:
        value = int(own[name].replace("_", ""))
    except ValueError as error:
        raise ConfigError(
            f"{name}={own[name]}: give a whole number" + (" of tokens." if name == "budget" else ".")
        ) from error
    if value < 1:
        raise ConfigError(f"{name}={value}: at least 1.")
    return value


def _earlier(out: Path, run: Run, own: dict[str, str], plan: Any) -> list[Trial]:
    """What an attempt before has measured; refused if it asked something else."""
    from megalong.evaluation.theta_search import trial_from
    from megalong.recipe.compose import to_yaml
    from megalong.runtime.files import write_text

    asked = json.dumps({"run": to_yaml(run.config), "own": {k: v for k, v in own.items() if k != "out"}, "plan": plan})
    mark, log = out / "asked.json", out / "trials.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) != json.loads(asked):
        raise ConfigError(f"{out} holds a search with other settings. Choose another out=, or remove it.")
    write_text(mark, asked)
    if not log.is_file():
        return []
    found = []
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            found.append(trial_from(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise DataError(f"{log}, line {number}: not a measurement. Remove it, and it is made again.") from error
            write_text(log, "".join(lines[:-1]))  # a kill cut it short
    return found


def _report(found: Found, run: Run, out: Path) -> None:
    from megalong.evaluation.theta_report import draw, table
    from megalong.runtime.files import write_text

    name = f"{run.config.stage.name}-found"
    write_text(out / "report.json", json.dumps(found.as_json(), indent=1) + "\n")
    write_text(out / "report.txt", table(found) + "\n")
    (out / "stage").mkdir(exist_ok=True)  # as --config-dir of the trainer wants it
    write_text(out / "stage" / f"{name}.yaml", _stage_file(run, found, name))
    draw(found, out / "loss_against_theta.png")
    console.say(table(found))
    console.say(f"{out}: report.json, report.txt, loss_against_theta.png")
    console.say(f"train with it: megalong/pretrain.py --config-dir {out} +stage={name} ...")


def _stage_file(run: Run, found: Found, name: str) -> str:
    """The stage as conf/stage has it, at full scale, with the theta that was found."""
    from omegaconf import OmegaConf

    from megalong.recipe.stages import load_stage

    scale = run.config.scale
    stage = (
        load_stage(run.config.stage.name, tuple(run.config.searchpath)) if scale.name != "full" else run.config.stage
    )
    stage = replace(stage, name=name, theta_law="fixed", theta=found.theta, card_minutes=None)
    where = (
        ""
        if scale.name == "full"
        else f" at scale {scale.name}, window {found.window:,} (train with +scale={scale.name})"
    )
    said = f"# theta found by tools/find_theta.py with {found.tokens:,} tokens{where}; lower bound {found.bound:,.0f}."
    return said + "\n" + OmegaConf.to_yaml(OmegaConf.create(asdict(stage)))


def command() -> int:
    """`megalong-find-theta`; exit code."""
    return launch.run(main)


if __name__ == "__main__":
    sys.exit(command())
