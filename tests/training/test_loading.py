"""What a run starts from is what was written, and finite; anything else is named before the first step."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalong.checkpoint import pointer
from megalong.checkpoint.checksums import CHECKSUMS
from megalong.checkpoint.dcp_metadata import METADATA, read_metadata
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from tests.checkpoint.test_hostile_checkpoints import put, saved, with_right_checksums
from tests.training.runs import outcome_of, run_stage
from tests.training.test_hand_over import tensors_of

TINY = ["model.num_hidden_layers=1", "model.hidden_size=64", "train.global_batch_size=2", "topology.tp=2"]
DOWN = "decoder.layers.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Hugging Face Llama in two files, with a list of checksums."""
    model = run_of(["+stage=65k", "+scale=mini", *TINY[:2]], 1).model
    folder = tmp_path_factory.mktemp("hf") / "base"
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    config = transformers.LlamaConfig(**{k: getattr(model, k) for k in keys + more}, rope_parameters=rope)
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1500KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    with_right_checksums(folder)
    return folder


@pytest.fixture(scope="module")
def run_dir(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 after its first step."""
    folder = tmp_path_factory.mktemp("run")
    ranks.run(run_stage, 2, str(folder), *TINY, "train.stop_after=1")
    return folder


def starts(ranks: RankPool, tmp_path: Path, base: Path) -> list[str]:
    settings = [*TINY, "train.stop_after=1", "checkpoint.save_steps=0", f"init_from={base}"]
    return ranks.run(outcome_of, 2, str(tmp_path / "run"), *settings)


def test_a_flipped_byte_of_any_file_of_a_hugging_face_folder_is_found(
    base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    for file in sorted(copy.glob("*.safetensors")):
        good = file.read_bytes()
        file.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        for outcome in starts(ranks, tmp_path, copy):
            assert outcome.startswith("CheckpointError")
            assert f"{file.name} was changed after it was written" in outcome
        file.write_bytes(good)
    (copy / CHECKSUMS).unlink()  # as the hub gives it
    assert starts(ranks, tmp_path, copy) == ["done", "done"]


def test_one_weight_that_is_not_finite_in_a_hugging_face_folder_is_named(
    base: Path, ranks: RankPool, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    name = "model.layers.0.mlp.down_proj.weight"
    file = next(f for f in copy.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    tensors[name][0, -1] = torch.inf  # the last column lies on the second tensor-parallel rank alone
    save_file(tensors, file, metadata={"format": "pt"})
    with_right_checksums(copy)
    for outcome in starts(ranks, tmp_path, copy):
        assert outcome.startswith("CheckpointError: rank 1: ")
        assert "decoder.layers.0.mlp.linear_fc2.weight holds values that are not finite" in outcome
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("key", [DOWN, f"optimizer.state.param.{DOWN}", f"optimizer.state.exp_avg_sq.{DOWN}"])
def test_a_value_that_is_not_finite_in_a_checkpoint_is_named(
    run_dir: Path, ranks: RankPool, tmp_path: Path, key: str
) -> None:
    folder = pointer.folder_of(Path(shutil.copytree(run_dir, tmp_path / "run")) / "checkpoints", 1)
    part = tensors_of(folder)[key].chunk(2, dim=2)[0].contiguous()  # as the first of two ranks wrote it
    part[0, 3, 3] = torch.nan
    put(folder, key, saved(part))
    (resumed, _) = ranks.run(outcome_of, 2, str(tmp_path / "run"), *TINY)
    assert "holds values that are not finite" in resumed
    assert "decoder.layers.0.mlp.linear_fc2.weight" in resumed
    assert resumed.startswith("CheckpointError")
    if "exp_avg" not in key:
        (begun, _) = ranks.run(outcome_of, 2, str(tmp_path / "next"), *TINY, f"init_from={folder}", stage="262k")
        assert "decoder.layers.0.mlp.linear_fc2.weight" in begun
        assert "holds values that are not finite" in begun
    assert not (tmp_path / "next" / "checkpoints").exists()


def test_a_checkpoint_of_fewer_tokens_than_the_vocabulary_is_refused(
    run_dir: Path, ranks: RankPool, tmp_path: Path
) -> None:
    folder = pointer.folder_of(Path(shutil.copytree(run_dir, tmp_path / "run")) / "checkpoints", 1)
    key = "embedding.word_embeddings.weight"
    metadata, places = read_metadata(folder)
    stored = metadata.state_dict_metadata[key]
    chunks = [chunk for chunk in stored.chunks if chunk.offsets[0] == 0]  # the first rank's rows alone
    metadata.state_dict_metadata[key] = replace(stored, size=torch.Size([2048, 64]), chunks=chunks)
    for index, _ in places[key]:
        if index.offset[0]:
            del metadata.storage_data[index]
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with_right_checksums(folder)
    for outcome in ranks.run(outcome_of, 2, str(tmp_path / "run"), *TINY):
        assert f"{key} has 2048 rows for a vocabulary of 4096" in outcome
