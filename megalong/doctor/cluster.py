"""What are the facts of this machine for the planner? Measures them on all ranks at once, and plans with the file.

`machine.calibrate` measures the parts; here real micro-batches and optimizer steps are timed as well, and what the
parts do not explain becomes the overhead per layer and per step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megalong.config.cluster import SHARES_OF_THE_PEAK, ClusterConfig, Fact, load_cluster, to_yaml, with_whole_shares
from megalong.doctor.part import Round
from megalong.doctor.result import NOTE, PASS, Check, held
from megalong.run import Run

LAYERS = 2
"""Of the model whose steps are timed: overheads are per layer, and a whole model does not fit on every rank."""


def measured_cluster(run: Run, name: str, per_node: int, folder: Path, pair: int = 1) -> ClusterConfig:
    """Cluster facts of the machine this runs on, with the shapes of one rank of `run`; every rank calls it.

    Args:
        run: on any layout; facts that cannot be measured are those of its cluster.
        per_node: ranks of one node; they are consecutive.
        folder: where checkpoints will be written.
        pair: GPUs below one switch; they are consecutive.
    """
    from megalong.machine.calibrate import flows, measure
    from megalong.planning.workload import workload_of
    from megalong.runtime import device

    work = workload_of(run, device.device().type)
    cluster = measure(run.config.cluster, work, per_node, folder)
    if 1 < pair < per_node and per_node % pair == 0:
        source = "nvidia-smi topo -m"
        across = {r: r + pair for r in range(per_node) if r // pair % 2 == 0 and r + pair < per_node}
        rate = flows(across).bytes_per_second / 1e9
        beside = Fact(float(f"{rate:.4g}"), "measured", f"from {len(across)} GPUs to the next pair at once")
        size = Fact(pair, "measured", source)
        cluster = dataclasses.replace(cluster, gpus_per_pair=size, node_gbs=beside)
    return _overheads(run, dataclasses.replace(cluster, name=name))


def _overheads(run: Run, cluster: ClusterConfig) -> ClusterConfig:
    """Time real micro-batches and steps of one rank's share, every rank by itself, and book what is left over."""
    import torch.distributed as dist

    from megalong.doctor.steps import Trainer
    from megalong.machine.calibrate import slowest_seconds
    from megalong.planning.duration import step_time
    from megalong.planning.workload import workload_of
    from megalong.runtime import device
    from megalong.topology.layout import Layout
    from megalong.topology.placement import Placement
    from megalong.training.forward import forward_backward

    ranks = dist.get_world_size()
    config, local = run.config, run.seq_length // run.layout.cp
    model = dataclasses.replace(config.model, num_hidden_layers=min(LAYERS, config.model.num_hidden_layers))
    attention = dataclasses.replace(
        config.attention, cp_comm_type="p2p", hierarchical_context_parallel_sizes=None, document_mask="none"
    )
    config = dataclasses.replace(config, model=model, attention=attention)
    alone = dataclasses.replace(run, config=config, seq_length=local, global_batch_size=ranks).on(Layout(dp=ranks))
    work = workload_of(alone, device.device().type)
    trainer = Trainer([], alone)
    step = slowest_seconds(lambda: forward_backward(local, trainer.model, trainer.batches(), 1), repeat=3)
    more = slowest_seconds(lambda: forward_backward(local, trainer.model, trainer.batches(), 3), repeat=3)
    update = slowest_seconds(trainer.optimizer.step, repeat=3)
    micro_batch = (more - step) / 2
    nothing = Fact(0.0, "measured", "to be found")
    free = dataclasses.replace(cluster, layer_overhead_s=nothing, step_overhead_s=nothing)
    parts = step_time(work, Placement(work.layout, free)).seconds
    explained = parts.matmul + parts.attention + parts.elementwise
    left = max(0.0, micro_batch - explained) / work.layers
    # parts measured one by one may take longer than together: then the real micro-batch is believed
    faster = max(1.0, explained / micro_batch)
    rates = (*SHARES_OF_THE_PEAK, "memory_efficiency")
    scaled: dict[str, Any] = {
        name: Fact(cluster.facts()[name].value * faster, "measured", cluster.facts()[name].source) for name in rates
    }
    source = "what products, attention and element-wise operators leave of a real micro-batch"
    rest = max(0.0, update - parts.optimizer)
    found = dataclasses.replace(
        cluster,
        layer_overhead_s=Fact(float(f"{left:.4g}"), "measured", source),
        step_overhead_s=Fact(float(f"{rest:.4g}"), "measured", "what its bytes leave of a real optimizer step"),
        **scaled,
    )
    return with_whole_shares(found, config.precision)


def on_ranks(settings: list[str], name: str, folder: str, pair: int) -> str:
    """The cluster file as text, as a task for all ranks of one node."""
    import torch.distributed as dist

    from megalong.recipe.resolve import run_of

    shapes = [None] if dist.get_rank() else [run_of(settings)]  # the run's own layout, not these ranks'
    dist.broadcast_object_list(shapes, src=0)
    assert isinstance(shapes[0], Run)
    return to_yaml(measured_cluster(shapes[0], name, dist.get_world_size(), Path(folder), pair))


def settings_of(visit: Round) -> list[str]:
    """The run whose shapes are measured: the user's, or the recipe's first stage (a small one without GPUs)."""
    default = [] if any(w.lstrip("+").startswith("stage=") for w in visit.settings) else ["+stage=65k"]
    if not visit.on_gpu and not any(w.lstrip("+").startswith("scale=") for w in visit.settings):
        default += ["+scale=mini", f"topology.cp={visit.ranks.count}"]
    return ["cluster=auto", *default, *visit.settings]


def run(visit: Round) -> list[Check]:
    """Write the file, read it back and plan with it."""
    from megalong.planning.plan import plan_of
    from megalong.recipe.resolve import run_of
    from megalong.runtime.errors import LayoutError

    settings = settings_of(visit)
    visit.cluster_file.parent.mkdir(parents=True, exist_ok=True)
    pair = visit.machine.links.pair_size() if visit.on_gpu else 1
    world = visit.ranks.count
    text = visit.ranks.run(on_ranks, world, settings, visit.name, str(visit.out), pair, timeout_s=420)[0]
    visit.cluster_file.write_text(text, encoding="utf-8")
    cluster = load_cluster(visit.cluster_file)
    tags = [fact.tag for fact in cluster.facts().values()]
    counted = ", ".join(f"{tags.count(tag)} {tag}" for tag in ("measured", "spec", "assumed") if tag in tags)
    facts = cluster.facts()
    shown = ("gemm_efficiency", "attention_forward_efficiency", "attention_backward_efficiency", "node_gbs")
    checks = [Check("facts of the cluster file", NOTE, f"{counted}: {visit.cluster_file}")]
    checks += [Check(n, NOTE, f"{facts[n].value:g} ({facts[n].tag})", facts[n].source) for n in shown]
    words = [w for w in settings if w != "cluster=auto"]
    words += [f"cluster={visit.cluster_file}", *([] if visit.settings else ["topology=auto"])]
    try:
        plan = plan_of(run_of(words, world))
    except LayoutError as error:  # an answer, too: this run needs other layouts or more devices
        return [*checks, Check("the file plans", PASS, str(error), "tools/plan.py")]
    told = f"{plan.step_s:.3g} s a step, {plan.memory.total / 2**30:.1f} GiB a rank, {plan.work.layout}"
    checks.append(held("the file plans", plan.step_s > 0 and plan.cluster.name == visit.name, told, "tools/plan.py"))
    return checks
