"""How long does a real optimizer step take, what share of the peak is it, and does the plan say the same?

On GPUs: Llama-3-8B's layers, as many as fit, 32,768 tokens on each rank (the share of a 1048k sequence on 32). On the
CPU the small model of the tests. Predicted from the measured cluster file where the part `cluster` has written it.
"""

from __future__ import annotations

from typing import Any

from megalong.config.cluster import load_cluster
from megalong.doctor.part import Round
from megalong.doctor.result import NOTE, Check, held

LOCAL_TOKENS = 32768
FACTORS = {"cuda": 2.0, "cpu": 3.0}
"""A plan that is off by more chooses the wrong layouts. CPU ranks share cores with whatever else runs."""
STEPS = 3


def shape_of(visit: Round) -> list[str]:
    """Settings of the step that is measured."""
    world = visit.ranks.count
    sizes = [f"topology.cp={world}", "topology.tp=1", "topology.pp=1", "topology.dp=1", "train.global_batch_size=1"]
    if not visit.on_gpu:
        return ["+stage=65k", "+scale=mini", *sizes, "train.global_batch_size=4"]
    return ["+stage=65k", f"stage.seq_length={LOCAL_TOKENS * world}", *sizes, "stage.theta=null", "cluster=auto"]


def layers_that_fit(visit: Round, settings: list[str]) -> int:
    """The most layers of 8, 4, 2 or 1 that the plan lets into this device's memory."""
    from megalong.planning.plan import plan_of
    from megalong.recipe.resolve import run_of

    for layers in (8, 4, 2):
        if plan_of(run_of([*settings, f"model.num_hidden_layers={layers}"], visit.ranks.count)).fits:
            return layers
    return 1


def on_ranks(settings: list[str]) -> dict[str, Any]:
    """Seconds of steps after the first, each as long as the slowest rank, as a task for all ranks."""
    import time

    import torch
    import torch.distributed as dist

    from megalong.doctor.steps import Trainer
    from megalong.runtime import device

    trainer = Trainer(settings)
    trainer.step()
    seconds = []
    for _ in range(STEPS):
        dist.barrier()
        begun = time.perf_counter()
        trainer.step()
        device.synchronize()
        took = torch.tensor(time.perf_counter() - begun, dtype=torch.float64, device=device.device())
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(float(took))
    return {"seconds": seconds, "peak_bytes": device.peak_memory_bytes()}


def run(visit: Round) -> list[Check]:
    """Seconds, tokens per second, MFU; measured against predicted."""
    from megalong.planning.plan import make_plan, utilisation
    from megalong.planning.workload import workload_of
    from megalong.recipe.resolve import run_of

    settings = shape_of(visit)
    if visit.on_gpu:
        settings += [f"model.num_hidden_layers={layers_that_fit(visit, settings)}"]
    found = visit.ranks.run(on_ranks, visit.ranks.count, settings, timeout_s=420)[0]
    seconds = min(found["seconds"])  # other work of the machine drops out
    run = run_of(settings, visit.ranks.count)
    work, measured = workload_of(run, visit.ranks.device), visit.cluster_file.exists()
    cluster = load_cluster(visit.cluster_file) if measured else run.config.cluster
    use = utilisation(work, cluster, seconds)
    title = f"a step, {work.model.num_hidden_layers} layers, window {work.seq_length:,}, {work.layout}"
    rate = f"{seconds:.3f} s, {use.tokens_per_second_per_gpu:,.0f} tokens/s a rank, MFU {use.mfu:.1%}"
    checks = [Check(title, NOTE, rate, f"peak {cluster.peak_tflops:.4g} TFLOP/s ({cluster.peak_bf16_tflops.tag})")]
    model_tflops = use.mfu * cluster.peak_tflops
    checks.append(Check("model TFLOP/s a rank", NOTE, f"{model_tflops:.4g}"))
    predicted = make_plan(work, cluster).step_s
    told = f"{predicted:.3f} s predicted, {seconds:.3f} s measured"
    if measured:
        factor = FACTORS[visit.ranks.device]
        good = 1 / factor <= predicted / seconds <= factor
        checks.append(held("predicted step", good, told, f"within a factor of {factor:.0f}"))
    else:
        checks.append(Check("predicted step", NOTE, told, "from assumed facts: run the part cluster before"))
    return checks
