"""A stage goes on from the fp32 master weights of the one before, not from their rounding to bf16, on any layout."""

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megalong.checkpoint import pointer
from megalong.checkpoint.plain_values import read_common
from megalong.checkpoint.sharded_reading import ShardedFolder
from megalong.runtime.ranks import RankPool
from tests.training.runs import run_stage

TINY = ["model.num_hidden_layers=2", "model.hidden_size=64", "train.global_batch_size=2"]
MASTER = "optimizer.state.param."


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every whole tensor of a checkpoint, by megatron-core's key."""
    with ShardedFolder(folder) as source:
        found = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in source.stored.items()}
        source.fill([ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in found.items()])
    return found


def begin_and_save(run_dir: str, *overrides: str) -> None:
    """The next stage, loaded and saved before its first step."""
    from megalong.checkpoint.save import Saving
    from megalong.training.state import contents_of
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, *TINY, *overrides, stage="262k")
    Saving(
        stage.saver.root, 0, stage.state.model, stage.state.optimizer, contents_of(stage.state, stage.settings)
    ).commit()


@pytest.fixture(scope="module")
def before(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bf16 after three steps."""
    folder = tmp_path_factory.mktemp("before")
    ranks.run(run_stage, 2, str(folder), *TINY, "topology.tp=2", "train.stop_after=3")
    return pointer.folder_of(folder / "checkpoints", 3)


LAYOUTS = {
    "the same layout": (2, "topology.tp=2"),
    "dp 2 pp 2": (4, "topology.dp=2", "topology.pp=2"),
    "fp32": (2, "topology.dp=2", "precision=fp32"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_next_stage_starts_from_the_masters(name: str, before: Path, ranks: RankPool, tmp_path: Path) -> None:
    world, *layout = LAYOUTS[name]
    ranks.run(begin_and_save, world, str(tmp_path), *layout, f"init_from={before}")
    after = pointer.folder_of(tmp_path / "checkpoints", 0)
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    weights = {key.removeprefix(MASTER) for key in old if key.startswith(MASTER)}
    assert len(weights) > 6
    assert any((old[MASTER + key] != old[key].float()).any() for key in weights)  # the rounding would show
    for key in weights:
        assert torch.equal(new[MASTER + key], old[MASTER + key]), key
        assert torch.equal(new[key], old[MASTER + key].to(new[key].dtype)), key
        assert new[key].dtype == (torch.float32 if name == "fp32" else torch.bfloat16)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not new[f"optimizer.state.{moment}.{key}"].any(), key
    groups = read_common(after)["optimizer"]["common"]["optimizer"]["param_groups"]
    assert [group["step"] for group in groups] == [0.0] * len(groups)


def test_a_run_that_goes_on_in_fp32_goes_on_from_the_masters(before: Path, ranks: RankPool, tmp_path: Path) -> None:
    changed = ["precision=fp32", "checkpoint.allow_changed=[precision]"]
    state = ranks.run(weights_after_resume, 2, str(before.parents[1]), "topology.dp=2", *changed)
    old = tensors_of(before)
    for found in state:  # on every data-parallel rank, not only in its share of the optimizer
        assert torch.equal(found, old[f"{MASTER}embedding.word_embeddings.weight"])


def weights_after_resume(run_dir: str, *overrides: str) -> torch.Tensor:
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, *TINY, *overrides)
    return next(p.detach().clone() for n, p in stage.state.model[0].named_parameters() if "word_embeddings" in n)
