"""Saved activations and the highest point of a step are those that torch's own memory profile finds in real runs."""

import pytest

from megalong.planning.memory import step_memory
from megalong.planning.workload import workload_of
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from tests.planning.steps import measure_memory
from tests.variants import long_but

SETTINGS = [
    "+stage=65k",
    "+scale=mini",
    "scale.window=32",
    "train.global_batch_size=2",
    "model.num_hidden_layers=2",
    "model.vocab_size=1024",
    "train.loss_chunk=512",
]
TOLERANCE = 0.05

CASES = {
    "no recompute": (1, ["train.recompute=none"]),
    "full recompute": (1, ["train.recompute=full"]),
    "selective recompute, whole logits, fp32": (
        1,
        ["train.recompute=selective", "train.loss_chunk=0", "precision=fp32"],
    ),
    "tensor and sequence parallel": (2, ["topology.tp=2", "train.recompute=none"]),
    "tensor parallel ring, full recompute": (4, ["topology.tp=2", "topology.cp=2", "train.recompute=full"]),
    "ring": (2, ["topology.cp=2", "train.recompute=none"]),
    "head exchange": (2, ["topology.cp=2", "attention.cp_comm_type=a2a", "train.recompute=none"]),
    "all-gather, full recompute": (4, ["topology.cp=4", "attention.cp_comm_type=all_gather", "train.recompute=full"]),
    "ring, attention kept": (2, ["topology.cp=2", "train.recompute=attention_kept"]),
    "all-gather, attention kept": (
        4,
        ["topology.cp=4", "attention.cp_comm_type=all_gather", "train.recompute=attention_kept"],
    ),
    "head exchange, attention kept, fp32": (
        2,
        ["topology.cp=2", "attention.cp_comm_type=a2a", "train.recompute=attention_kept", "precision=fp32"],
    ),
    "MLP in tiles, attention kept": (1, ["train.mlp_chunk=256", "train.recompute=attention_kept"]),
    "tensor parallel, MLP in tiles, fp32": (
        2,
        ["topology.tp=2", "train.mlp_chunk=256", "train.recompute=full", "precision=fp32"],
    ),
    "MLP in tiles, no recompute": (1, ["train.mlp_chunk=512", "train.recompute=none"]),
    "pipeline": (2, ["topology.pp=2", "train.recompute=none"]),
    "pipeline, full recompute": (2, ["topology.pp=2", "train.recompute=full"]),
}


IN_SHORT = (
    "no recompute",
    "tensor parallel ring, full recompute",
    "ring, attention kept",
    "MLP in tiles, attention kept",
)


@pytest.mark.parametrize("name", long_but(CASES, *IN_SHORT))
def test_saved_activations_and_peak_are_within_five_percent(name: str, ranks: RankPool) -> None:
    world_size, overrides = CASES[name]
    work = workload_of(run_of([*SETTINGS, *overrides], world_size))
    measured = ranks.run(measure_memory, world_size, [*SETTINGS, *overrides])
    for stage in range(work.layout.pp):
        # ranks of a stage are alike
        alike = [m for rank, m in enumerate(measured) if work.layout.coordinates(rank).pp == stage]
        found = step_memory(work, stage)
        assert found.peak == pytest.approx(min(m.peak for m in alike), rel=TOLERANCE)
        if work.layout.pp == 1:
            assert found.saved == pytest.approx(min(m.saved for m in alike), rel=TOLERANCE)
