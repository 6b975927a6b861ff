"""Stages by Transformer Engine's layers and FusedAdam and by our own, in a process that finds Transformer Engine.

    python -m tests.model.trained_by_transformer_engine FOLDER      # prints what it found as JSON

What stands in for it is `tests/fakes/te`: a process of its own, because megatron-core looks for it on import.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

THEIRS = ("attention=transformer_engine", "train.adam=transformer_engine", "train.mlp_chunk=0")
SMALL = (
    "precision=fp32", "train.global_batch_size=2", "model.hidden_size=64", "model.intermediate_size=96",
    "model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=16",
    "stage.rope_scaling={rope_type: yarn}", "model.attention_bias=true", "model.mlp_bias=true",
)  # fmt: skip


def trained(folder: Path, to: int, *overrides: str) -> tuple[dict[str, Any], list[tuple[float, float]]]:
    """State, and (loss, gradient norm) of every step, of a stage that goes on in `folder` up to a step."""
    from megatron.core import parallel_state

    from tests.training.runs import metrics, run_stage

    parallel_state.destroy_model_parallel()
    state = run_stage(str(folder), *SMALL, f"train.stop_after={to}", *overrides)
    return state, [(line["loss"], line["grad_norm"]) for line in metrics(folder) if "grad_norm" in line]


def stages(folder: Path) -> dict[str, Any]:
    """Two steps by each, then two by the other one."""
    from megalong.training import step
    from megalong.training.finite import NonFiniteError
    from megalong.training.verify import relative_distance

    ours, theirs = folder / "ours", folder / "theirs"
    trained(ours, 2)
    _, by_theirs = trained(theirs, 2, *THEIRS, "train.recompute=full")
    shutil.copytree(ours, folder / "then theirs")
    _, then_theirs = trained(folder / "then theirs", 4, *THEIRS, "train.recompute=selective")
    update, step._update = step._update, lambda *_: (math.nan, False)
    with suppress(NonFiniteError):
        trained(folder / "none", 2, *THEIRS, "checkpoint.save_steps=1")
    step._update = update
    after_none, _ = trained(folder / "none", 3)
    state, alone = trained(ours, 4)
    then_ours, _ = trained(theirs, 4)
    return {
        "alone": alone,
        "updates after none": {float(value) for name, value in after_none.items() if name.endswith(".step")}.pop(),
        "theirs": by_theirs,
        "then theirs": then_theirs,
        "state": {name: relative_distance(then_ours[name], value) for name, value in state.items()},
    }


def context_parallel() -> dict[str, list[int]]:
    """By algorithm, the global ranks that attention on rank 5 of 8 is given; on groups that carry nothing."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megalong.model.gpt import build_module
    from megalong.recipe.resolve import run_of
    from megalong.topology.groups import initialize

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    found = {}
    for algorithm in ("p2p", "a2a", "all_gather", "a2a+p2p"):
        words = [f"attention.cp_comm_type={algorithm}", "topology.cp=4", "topology.tp=1"]
        if algorithm == "a2a+p2p":
            words.append("attention.hierarchical_context_parallel_sizes=[2,2]")
        run = run_of(["+stage=65k", "+scale=mini", *THEIRS, *words], 8)
        parallel_state.destroy_model_parallel()
        initialize(run.layout, run.config.attention.hierarchical_context_parallel_sizes)
        module: Any = build_module(run)
        attention = module.module.decoder.layers[0].self_attention.core_attention
        assert attention.cp_comm_type == algorithm
        groups = attention.cp_group if algorithm == "a2a+p2p" else [attention.cp_group]
        found[algorithm] = [attention.cp_global_ranks, *map(dist.get_process_group_ranks, groups)]
    return found


def main() -> None:
    import torch.distributed as dist

    from megalong.runtime import device

    device.install()
    from megatron.core.extensions.transformer_engine import HAVE_TE

    assert HAVE_TE
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    found = stages(Path(sys.argv[1]))
    dist.destroy_process_group()
    print(json.dumps(found | {"context parallel": context_parallel()}))


if __name__ == "__main__":
    main()
