"""What a stage trains with a rope scaling is what transformers computes from its export."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megalong.convert.to_hf import megatron_to_hf
from megalong.evaluation.checkpoint import evaluation_run, find_checkpoint, layout_for, opened
from megalong.evaluation.sample import Sample, Slot
from megalong.evaluation.score import score
from tests.evaluation.models import transformers_slots
from tests.training.runs import outcome_of

YARN = "stage.rope_scaling={rope_type: yarn}"


def score_on_ranks(folder: str, samples: list[Sample]) -> list[Slot]:
    checkpoint = find_checkpoint(Path(folder))
    run = evaluation_run(checkpoint.model, layout_for(dist.get_world_size(), 1, 2, 1), precision="fp32")
    with opened(checkpoint, run) as model:
        return score(run, model, samples, 1)


def test_a_stage_with_yarn_exports_what_it_trained(ranks, tmp_path):
    words = [YARN, "stage.theta_law=unchanged", "precision=fp32", "topology.cp=2", "train.steps=1"]
    assert ranks.run(outcome_of, 2, str(tmp_path / "run"), *words) == ["done", "done"]
    megatron_to_hf(tmp_path / "run", tmp_path / "hf", 2**30)
    model = find_checkpoint(tmp_path / "hf").model
    assert model.rope_scaling == {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}

    tokens = torch.randint(0, 4096, (257,), generator=torch.Generator().manual_seed(0))
    slots = torch.zeros(257, dtype=torch.int64)
    slots[0] = -1
    samples = [Sample(tokens, slots)]
    (found,) = ranks.run(score_on_ranks, 2, str(tmp_path / "run"), samples)[0]
    ((loss, hits, count),) = transformers_slots(tmp_path / "hf", samples, 1)
    assert found.tokens == count == 256
    assert abs(found.mean_loss - loss / count) < 1e-4
    assert found.hits == hits


def test_a_stage_refuses_weights_of_another_scaling(ranks, tmp_path):
    assert ranks.run(outcome_of, 1, str(tmp_path / "a"), YARN, "train.steps=1") == ["done"]
    (said,) = ranks.run(
        outcome_of, 1, str(tmp_path / "b"), f"init_from={tmp_path / 'a'}", "train.steps=1", stage="262k"
    )
    assert "rope_scaling" in said
    assert "(configured None)" in said
