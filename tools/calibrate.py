"""Measure this machine and write a cluster file: what `tools/plan.py calibrate` runs on every rank.

  torchrun --nproc-per-node 8 tools/plan.py calibrate name=mine file=conf/cluster/mine.yaml \\
      [gpus_per_node=8] [+stage=65k +scale=mini topology.cp=8 ...]

The settings give the shapes: the local tokens, heads and widths of one rank of that run. After the parts (products,
attention, copies, wires), one real micro-batch and one real optimizer step of the trainer are timed on every rank by
itself; what the parts do not explain becomes the overhead per layer and per step.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

from megalong.config.cluster import ClusterConfig, Fact
from megalong.config.schema import Config
from megalong.planning.workload import Workload
from megalong.runtime import launch
from megalong.runtime.errors import ConfigError
from megalong.topology.layout import Layout


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
    from megalong.recipe.compose import compose
    from megalong.runtime import console, device

    console.speak_only_from(process.is_first)
    with console.gathered_notices("torch and megatron-core"):
        device.install()
        from megalong.planning import calibrate
    if not any(o.lstrip("+").startswith("stage=") for o in overrides):
        overrides = ["+stage=65k", *overrides] if device.on_cuda() else ["+stage=65k", "+scale=mini", *overrides]
    config = compose(overrides)
    per_node = int(own["gpus_per_node"] or os.environ.get("LOCAL_WORLD_SIZE", str(process.world_size)))
    if process.world_size % per_node:
        raise ConfigError(f"gpus_per_node={per_node} does not divide the {process.world_size} ranks started.")
    launch.init_process_group(process, timeout_s=600)
    from megalong.planning.workload import workload_of

    work = workload_of(config, device.device().type)
    path = Path(own["file"] or f"{own['name']}.yaml")
    cluster = calibrate.measure(config.cluster, work, per_node, path.resolve().parent)
    cluster = dataclasses.replace(cluster, name=own["name"])
    cluster = _overheads(config, work, cluster)
    if process.is_first:
        path.write_text(calibrate.to_yaml(cluster), encoding="utf-8")
        for name, fact in cluster.facts().items():
            if fact.tag == "measured":
                console.say(f"{name:<32} {fact.value:>12g}  {fact.source}")
        console.say(f"written: {path}; use it with cluster={path.stem} when it lies in conf/cluster")
    return 0


def _overheads(config: Config, work: Workload, cluster: ClusterConfig) -> ClusterConfig:
    """Time real micro-batches and steps of one rank's share, every rank by itself, and book what is left over."""
    import torch.distributed as dist

    from megalong.model.gpt import build
    from megalong.planning.calibrate import slowest_seconds
    from megalong.planning.duration import step_time
    from megalong.topology.groups import initialize
    from megalong.topology.placement import Placement
    from megalong.training.step import build_optimizer, forward_backward

    ranks = dist.get_world_size()
    config.stage.seq_length = work.local_tokens
    config.topology.tp = config.topology.cp = config.topology.pp = 1
    config.topology.dp = ranks
    config.attention.cp_comm_type = "p2p"
    alone = dataclasses.replace(
        work, layout=Layout(dp=ranks), seq_length=work.local_tokens, global_batch_size=ranks, cp_comm_type="p2p"
    )
    initialize(alone.layout)
    model = build(config)
    optimizer = build_optimizer(config, model)
    step = slowest_seconds(lambda: forward_backward(config, model, _batches(config), 1), repeat=3)
    more = slowest_seconds(lambda: forward_backward(config, model, _batches(config), 3), repeat=3)
    update = slowest_seconds(optimizer.step, repeat=3)
    micro_batch = (more - step) / 2
    nothing = Fact(0.0, "measured", "to be found")
    free = dataclasses.replace(cluster, layer_overhead_s=nothing, step_overhead_s=nothing)
    parts = step_time(alone, Placement(alone.layout, free)).seconds
    explained = parts.matmul + parts.attention + parts.elementwise
    left = max(0.0, micro_batch - explained) / alone.layers
    # parts measured one by one may take longer than together: then the real micro-batch is believed
    faster = max(1.0, explained / micro_batch)
    rates = ("gemm_efficiency", "attention_forward_efficiency", "attention_backward_efficiency", "memory_efficiency")
    scaled: dict[str, Any] = {
        name: Fact(cluster.facts()[name].value * faster, "measured", cluster.facts()[name].source) for name in rates
    }
    source = "what products, attention and element-wise operators leave of a real micro-batch"
    rest = max(0.0, update - parts.optimizer)
    return dataclasses.replace(
        cluster,
        layer_overhead_s=Fact(float(f"{left:.4g}"), "measured", source),
        step_overhead_s=Fact(float(f"{rest:.4g}"), "measured", "what its bytes leave of a real optimizer step"),
        **scaled,
    )


def _batches(config: Config) -> Any:
    import torch

    tokens = torch.randint(0, config.model.vocab_size, (1, config.stage.seq_length))
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "document_starts": None}
    return itertools.repeat(batch)
