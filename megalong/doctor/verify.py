"""Does every layout that fits this machine compute what one CPU rank computes? Loss and every gradient, in fp32; and in
bf16 on GPUs, with the kernels that training takes, against one GPU rank.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megalong.doctor.part import Round
from megalong.doctor.ranks import run_on_ranks
from megalong.doctor.result import Check, held
from megalong.runtime.ranks import RankFailed

SMALL = ["stage.seq_length=16384", "model.num_hidden_layers=2", "train.global_batch_size=4"]
LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 5e-2)}
"""Relative error of the loss, relative L2 distance of a gradient: those of `tools/verify.py`."""

Layouts = dict[str, list[str]]
INTRA = "attention.document_mask=intra"


def layouts(world: int) -> Layouts:
    """What to try on `world` ranks: every axis, every algorithm, documents."""

    def sizes(**axes: int) -> list[str]:
        return [f"topology.{axis}={axes.get(axis, 1)}" for axis in ("tp", "cp", "pp", "dp")]

    if world == 1:
        return {"one rank": sizes()}
    if world < 4:
        world = 2
        return {
            "tp 2": sizes(tp=2),
            "cp 2, ring, documents": [*sizes(cp=2), INTRA],
            "cp 2, heads": [*sizes(cp=2), "attention.cp_comm_type=a2a"],
            "pp 2": sizes(pp=2),
            "dp 2": sizes(dp=2),
        }
    both = [
        "attention.cp_comm_type=a2a+p2p",
        f"attention.hierarchical_context_parallel_sizes=[2,{world // 2}]",
    ]
    return {
        f"cp {world}, ring, documents": [*sizes(cp=world), INTRA],
        f"cp {world}, heads inside, ring outside": [*sizes(cp=world), *both],
        f"cp {world}, all-gather": [*sizes(cp=world), "attention.cp_comm_type=all_gather"],
        f"tp 2, cp {world // 2}": sizes(tp=2, cp=world // 2),
        f"cp 2, dp {world // 2}, documents": [*sizes(cp=2, dp=world // 2), INTRA],
        f"cp 2, pp 2, dp {world // 4}": sizes(cp=2, pp=2, dp=world // 4),
    }


def expected(settings: list[str], folder: str) -> None:
    """Leave weights, and what one rank makes of them with and without documents, as a task for one rank."""
    from megatron.core import parallel_state

    from megalong.training.verify import measure_on_rank, random_hf

    hf = Path(folder) / "hf"
    one = [f"topology.{axis}=1" for axis in ("tp", "cp", "pp", "dp")]
    if not hf.exists():
        hf.mkdir()
        random_hf(run_on_ranks([*settings, *one]), hf)
    for name, words in (("none", []), ("intra", [INTRA])):
        found = measure_on_rank([*settings, *words, *one], str(hf))
        torch.save((found.loss, {n: g.cpu() for n, g in found.gradients.items()}), Path(folder) / f"{name}.pt")
        parallel_state.destroy_model_parallel()


def distances(cases: Layouts, settings: list[str], folder: str) -> dict[str, tuple[float, float, str] | str]:
    """For every layout: relative error of the loss, the largest distance of a gradient and its name; or what stopped
    it. A task for all ranks."""
    from megatron.core import parallel_state

    from megalong.runtime.errors import UserError
    from megalong.training.verify import measure, relative_distance, synthetic_samples

    found: dict[str, tuple[float, float, str] | str] = {}
    for name, words in cases.items():
        try:
            run = run_on_ranks([*settings, *words])
            got = measure(run, Path(folder) / "hf", {"": synthetic_samples(run)})[""]
        except UserError as error:
            found[name] = str(error)
            continue
        if dist.get_rank() == 0:
            mask = "intra" if INTRA in words else "none"
            loss, gradients = torch.load(Path(folder) / f"{mask}.pt", weights_only=True)
            far = {n: relative_distance(got.gradients[n].cpu(), g) for n, g in gradients.items()}
            # a distance that is no number is the worst of all
            worst = max(far, key=lambda n: far[n] if far[n] == far[n] else float("inf"))
            found[name] = (abs(got.loss - loss) / abs(loss), far[worst], worst)
        parallel_state.destroy_model_parallel()
    return found


def judged(found: dict[str, tuple[float, float, str] | str], precision: str) -> list[Check]:
    """Distances against the limits of a precision."""
    loss_limit, gradient_limit = LIMITS[precision]
    limit = f"loss {loss_limit:.0e}, gradients {gradient_limit:.0e}"
    checks = []
    for name, result in found.items():
        if isinstance(result, str):
            checks.append(held(f"{name}, {precision}", False, result, limit))
            continue
        loss, gradient, worst = result
        good = loss <= loss_limit and gradient <= gradient_limit  # False for what is no number
        told = f"loss {loss:.1e}, gradients {gradient:.1e} ({worst})"
        checks.append(held(f"{name}, {precision}", good, told, limit))
    return checks


def run(visit: Round) -> list[Check]:
    """All layouts in fp32 against one CPU rank; on GPUs also in bf16 against one GPU rank."""
    used = next(n for n in (8, 4, 2, 1) if n <= visit.ranks.count)
    cases = layouts(used)
    checks = []
    with tempfile.TemporaryDirectory(prefix="megalong-doctor-") as folder:
        fp32 = ["precision=fp32", "attention.kernel=reference" if visit.on_gpu else "attention.kernel=auto", *SMALL]
        visit.ranks.on_cpu(expected, 1, ["+stage=65k", "+scale=mini", *SMALL, "precision=fp32"], folder)
        checks += judged(visit.ranks.run(distances, used, cases, [*visit.mini, *fp32], folder)[0], "fp32")
        if visit.on_gpu and used > 1:
            bf16 = [*visit.mini, *SMALL, "precision=bf16"]
            try:
                visit.ranks.run(expected, 1, bf16, folder)
                checks += judged(visit.ranks.run(distances, used, cases, bf16, folder)[0], "bf16")
            except RankFailed as error:
                checks.append(held("bf16", False, str(error).strip().splitlines()[-1], "a result"))
    return checks
