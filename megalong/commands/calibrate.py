"""Measure this machine and write a cluster file: what `tools/plan.py calibrate` runs on every rank.

  torchrun --nproc-per-node 8 tools/plan.py calibrate name=mine file=conf/cluster/mine.yaml \\
      [gpus_per_node=8] [+stage=65k +scale=mini topology.cp=8 ...]

The settings give the shapes: the local tokens, heads and widths of one rank of that run. After the parts (products,
attention, copies, wires), one real micro-batch and one real optimizer step of the trainer are timed on every rank by
itself; what the parts do not explain becomes the overhead per layer and per step.
"""

from __future__ import annotations

import os
from pathlib import Path

from megalong.config.cluster import to_yaml
from megalong.runtime import launch
from megalong.runtime.errors import ConfigError


def main(arguments: list[str]) -> int:
    """Run on every rank; rank 0 writes.

    Returns:
        exit code.
    """
    own = {"name": "measured", "file": "", "gpus_per_node": ""}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in own:
            own[key] = value
        else:
            overrides.append(argument)
    return launch.run(lambda process: _calibrate(process, own, overrides))


def _calibrate(process: launch.Process, own: dict[str, str], overrides: list[str]) -> int:
    from megalong.recipe.resolve import run_of
    from megalong.runtime import console, device

    console.speak_only_from(process.is_first)
    with console.gathered_notices("torch and megatron-core"):
        device.install()
        from megalong.doctor.cluster import measured_cluster
    if not any(o.lstrip("+").startswith("stage=") for o in overrides):
        overrides = ["+stage=65k", *overrides] if device.on_cuda() else ["+stage=65k", "+scale=mini", *overrides]
    run = run_of(["cluster=auto", *overrides])  # what cannot be measured is taken from a file of the same card
    per_node = int(own["gpus_per_node"] or os.environ.get("LOCAL_WORLD_SIZE", str(process.world_size)))
    if process.world_size % per_node:
        raise ConfigError(f"gpus_per_node={per_node} does not divide the {process.world_size} ranks started.")
    launch.init_process_group(process, timeout_s=600)
    path = Path(own["file"] or f"{own['name']}.yaml")
    cluster = measured_cluster(run, own["name"], per_node, path.resolve().parent)
    if process.is_first:
        path.write_text(to_yaml(cluster), encoding="utf-8")
        for name, fact in cluster.facts().items():
            if fact.tag == "measured":
                console.say(f"{name:<32} {fact.value:>12g}  {fact.source}")
        console.say(f"written: {path}; take it with cluster={path.stem} from conf/cluster or a folder of --config-dir")
    return 0
