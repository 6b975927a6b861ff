"""Does a step take the memory that the plan says? Highest point of real steps, by torch's own books.

On the CPU: allocations of forward and backward, from torch's profiler, beside the plan's tape. On GPUs: the allocator's
highest point over whole steps beside all terms of the plan but its reserve, without and with recompute.
"""

from __future__ import annotations

from megalong.doctor.part import Round
from megalong.doctor.result import NOT_RUN, Check, held

CPU = ["+stage=65k", "+scale=mini", "scale.window=32", "train.global_batch_size=2", "model.num_hidden_layers=2"]
CPU += ["model.vocab_size=1024", "train.loss_chunk=512"]
GPU = ["+stage=65k", "cluster=auto", "stage.theta=null", "stage.seq_length=16384", "model.num_hidden_layers=2"]
GPU += ["train.global_batch_size=1", "topology.tp=1", "topology.cp=1", "topology.pp=1", "topology.dp=1"]
LIMITS = {"cpu": 0.05, "cuda": 0.10}
"""Relative."""


def on_gpu(settings: list[str]) -> int:
    """Highest bytes of the allocator over two steps after the first, as a task for one rank."""
    import torch

    from megalong.doctor.steps import Trainer

    trainer = Trainer(settings)
    trainer.step()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        trainer.step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def run(visit: Round) -> list[Check]:
    """Both policies of recompute that differ most."""
    from megalong.doctor.steps import measure_memory
    from megalong.planning.memory import memory_plan, step_memory
    from megalong.planning.workload import workload_of
    from megalong.recipe.resolve import run_of

    limit, checks = LIMITS[visit.ranks.device], []
    for policy in ("none", "full"):
        settings = [*(GPU if visit.on_gpu else CPU), f"train.recompute={policy}"]
        run = run_of(settings, 1)
        work = workload_of(run, visit.ranks.device)
        if visit.on_gpu:
            plan = memory_plan(work, run.config.cluster)
            if not plan.fits:
                needs = f"{plan.total / 2**30:.1f} GiB planned, {plan.capacity / 2**30:.1f} here"
                checks.append(Check(f"peak, recompute {policy}", NOT_RUN, needs))
                continue
            measured = visit.ranks.run(on_gpu, 1, settings)[0]
            predicted = plan.total - plan.terms["reserve"]
        else:
            measured = visit.ranks.run(measure_memory, 1, settings)[0].peak
            predicted = step_memory(work, 0).peak
        off = predicted / measured - 1
        told = f"{predicted / 2**20:,.2f} MiB predicted, {measured / 2**20:,.2f} measured ({off:+.1%})"
        checks.append(held(f"peak, recompute {policy}", abs(off) <= limit, told, f"within {limit:.0%}"))
    return checks
