"""Does information cross the context-parallel group here, and does the canary say so when it does not?"""

from __future__ import annotations

from typing import Any

from megalong.doctor.part import Round
from megalong.doctor.ranks import run_on_ranks
from megalong.doctor.result import NOT_RUN, Check, held

SMALL = ["model.num_hidden_layers=1", "stage.seq_length=16384", "train.global_batch_size=8"]


def layouts(world: int) -> dict[str, list[str]]:
    """Settings of every algorithm that a context-parallel group of `world` ranks has."""
    found = {name: [f"attention.cp_comm_type={name}"] for name in ("p2p", "a2a", "all_gather")}
    if world % 2 == 0 and world > 2:
        sizes = f"attention.hierarchical_context_parallel_sizes=[{world // 2},2]"
        found["a2a+p2p"] = ["attention.cp_comm_type=a2a+p2p", sizes]
    return found if world > 1 else {"one rank": []}


def on_rank(cases: dict[str, list[str]], settings: list[str]) -> dict[str, dict[str, Any]]:
    """For every case: what the canary says (empty: nothing), and what it says when the data of two ranks is swapped and
    when boundaries are ignored."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megalong.attention import canary
    from megalong.attention.core import CoreAttention
    from megalong.model.gpt import attention_of, build
    from megalong.runtime import device
    from megalong.runtime.errors import CanaryError, UserError
    from megalong.topology.groups import initialize

    world = dist.get_world_size()

    def said(core: CoreAttention, rank: int) -> str:
        try:
            canary.check(core, rank, device.device())
        except CanaryError as error:
            return str(error)
        return ""

    found = {}
    for name, words in cases.items():
        try:
            run = run_on_ranks([*settings, *SMALL, *words, f"topology.cp={world}", "attention.document_mask=intra"])
        except UserError as error:  # so many ranks do not divide the small model's heads or window
            found[name] = {"not run": str(error)}
            continue
        initialize(run.layout, run.config.attention.hierarchical_context_parallel_sizes)
        core = attention_of(build(run))
        assert core is not None
        rank = parallel_state.get_context_parallel_rank()
        found[name] = {"sound": said(core, rank)}
        if world > 1:
            found[name]["data of ranks 0 and 1 swapped"] = said(core, {0: 1, 1: 0}.get(rank, rank))
        right = CoreAttention._documents
        CoreAttention._documents = lambda self, starts: None  # type: ignore[method-assign]
        try:
            found[name]["document boundaries ignored"] = said(core, rank)
        finally:
            CoreAttention._documents = right  # type: ignore[method-assign]
        parallel_state.destroy_model_parallel()
    return found


def run(visit: Round) -> list[Check]:
    """Sound attention passes, planted faults are named."""
    world = visit.ranks.count
    found = visit.ranks.run(on_rank, world, layouts(world), [*visit.mini, "precision=bf16"])[0]
    checks = []
    for name, said in found.items():
        if "not run" in said:
            checks.append(Check(f"{name}, cp {world}", NOT_RUN, said["not run"]))
            continue
        sound = said.pop("sound")
        told = "nothing lost, nothing leaks, forward and backward" if not sound else " ".join(sound.split())[:300]
        checks.append(held(f"{name}, cp {world}, bf16, documents", not sound, told, "exact"))
        silent = [fault for fault, text in said.items() if not text]
        told = f"missed: {', '.join(silent)}" if silent else f"found: {', '.join(said)}"
        checks.append(held(f"{name}: planted faults", not silent, told, "all found"))
    return checks
