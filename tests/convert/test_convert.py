"""Conversion is exact: Hugging Face -> Megatron -> Hugging Face gives the same bytes, and megatron-core computes what
transformers computes, at any layout and in either layer spec."""

from __future__ import annotations

import filecmp
import json
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.checkpoint.checksums import Checksums, write_checksums
from megalong.checkpoint.info import read_info, write_info
from megalong.convert.compare import tensor_differences
from megalong.convert.hf_folder import for_window
from megalong.convert.table import table
from megalong.convert.to_hf import megatron_to_hf
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import open_weights
from megalong.model.llama import model_from_hf, model_to_hf
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import sha256_of
from megalong.runtime.ranks import RankPool
from megalong.topology.layout import Layout
from tests.llamas import build_on_rank, hf_config, hf_logits, rank_logits, save_hf

TOKENS = torch.randint(0, 250, (1, 64), generator=torch.Generator().manual_seed(1))
ORIGINAL = {"original_max_position_embeddings": 128}
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "truncate": False, **ORIGINAL},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        **ORIGINAL,
    },
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 4]))
    rope = {
        **draw(st.sampled_from(list(ROPE.values()))),
        "rope_theta": draw(st.sampled_from([1e4, 15296098.0, 1234.5])),
    }
    return hf_config(
        vocab_size=draw(st.integers(5, 300)),
        hidden_size=draw(st.sampled_from([16, 48])) * groups,
        intermediate_size=draw(st.integers(1, 40)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(1, 2)),
        num_key_value_heads=groups,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        rope_theta=None,
        rope_parameters=rope,
        pad_token_id=draw(st.sampled_from([None, 3])),
    )


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def assert_same_files(a: Path, b: Path, which: list[str]) -> None:
    equal, different, absent = filecmp.cmpfiles(a, b, which, shallow=False)
    assert not different, different
    assert not absent, absent
    assert equal == which


@settings(max_examples=15, deadline=None)
@given(
    config=configs(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shard=st.sampled_from([10**9, 60_000, 15_000]),
)
def test_there_and_back_gives_the_bytes_that_transformers_wrote(config, dtype, shard):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_hf(folder / "hf", config, dtype, max_shard_size=shard)
        hf_to_megatron(folder / "hf", folder / "megatron")
        megatron_to_hf(folder / "megatron", folder / "back", shard)
        written = [name for name in names(folder / "hf") if name != "config.json"]
        assert_same_files(folder / "hf", folder / "back", written)
        assert names(folder / "back") == sorted([*names(folder / "hf"), "checksums.json"])

        back = json.loads((folder / "back" / "config.json").read_text())
        theta = config["rope_parameters"]["rope_theta"]
        assert back["rope_theta"] == back["rope_parameters"]["rope_theta"] == theta
        assert back["rope_parameters"] == config["rope_parameters"]
        assert {k: back[k] for k in config if "rope" not in k} == {k: v for k, v in config.items() if "rope" not in k}
        assert model_from_hf(back) == model_from_hf(config)

        hf_to_megatron(folder / "back", folder / "megatron again")
        megatron_to_hf(folder / "megatron again", folder / "back again", shard)
        assert_same_files(folder / "back", folder / "back again", names(folder / "back"))
        tensors = [name for name in names(folder / "megatron") if name.endswith(".distcp")]
        assert_same_files(folder / "megatron", folder / "megatron again", [*tensors, ".metadata", "common.pt"])


@pytest.mark.parametrize("dtype", ["bfloat16", "fp16"])
def test_a_cast_rounds_as_torch_does(tmp_path, dtype):
    save_hf(tmp_path / "hf", hf_config())
    hf_to_megatron(tmp_path / "hf", tmp_path / "cast", dtype=dtype)
    megatron_to_hf(tmp_path / "cast", tmp_path / "back")
    save_hf(tmp_path / "reference", hf_config(), torch.bfloat16 if dtype == "bfloat16" else torch.float16)
    assert_same_files(tmp_path / "reference", tmp_path / "back", ["model.safetensors"])
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] in ("bfloat16", "float16")
    megatron_to_hf(tmp_path / "cast", tmp_path / "wide", dtype="float32")
    assert model_from_hf(tmp_path / "wide") == model_from_hf(tmp_path / "hf")


def test_tensors_are_cut_into_blocks_without_a_seam(tmp_path, monkeypatch):
    save_hf(tmp_path / "hf", hf_config(num_hidden_layers=1, attention_bias=True))
    monkeypatch.setattr("megalong.convert.blocks.row_blocks", lambda rows, size, unit: _pieces(rows, 7))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_same_files(tmp_path / "hf", tmp_path / "back", ["model.safetensors"])


def _pieces(rows: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(rows, start + step)) for start in range(0, rows, step)]


# megatron-core ---------------------------------------------------------------------------------------------------


def load(folder: Path, layout: Layout, seq_length: int, engine_spec: bool) -> tuple[torch.nn.Module, int]:
    from megatron.core import dist_checkpointing

    from tests.convert import engine

    model = model_from_hf(json.loads((folder / "megalong.json").read_text())["hf_config"])
    with mock.patch("megalong.model.gpt.block_spec", engine.block_spec) if engine_spec else nullcontext():
        module = build_on_rank(model, layout, seq_length)
    loaded = dist_checkpointing.load({"model": module.sharded_state_dict()}, str(folder))
    module.load_state_dict(loaded["model"])
    return module, model.vocab_size


def load_and_compute(folder: Path, layout: Layout, engine_spec: bool) -> torch.Tensor | None:
    module, vocab_size = load(folder, layout, TOKENS.shape[1], engine_spec)
    return rank_logits(module, vocab_size, TOKENS)


def load_and_save(folder: Path, layout: Layout, target: Path) -> None:
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    module, _ = load(folder, layout, TOKENS.shape[1], False)
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": module.sharded_state_dict()}, str(target))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/, and megatron/ made from it; a vocabulary of 250 needs padding at tp 4."""
    folder = tmp_path_factory.mktemp("converted")
    save_hf(folder / "hf", hf_config(attention_bias=True))
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


@pytest.mark.parametrize("engine_spec", [False, True], ids=["local spec", "spec of Transformer Engine's shape"])
@pytest.mark.parametrize("layout", [Layout(tp=t, pp=p) for t in (1, 2, 4) for p in (1, 2)], ids=str)
def test_megatron_loads_it_at_any_layout_with_the_same_logits(converted, ranks: RankPool, layout, engine_spec):
    if engine_spec and layout not in (Layout(), Layout(tp=2, pp=2)):
        pytest.skip("the names do not depend on the layout")
    results = ranks.run(load_and_compute, layout.world_size, converted / "megatron", layout, engine_spec)
    expected = hf_logits(converted / "hf", TOKENS)
    last = [r for rank, r in enumerate(results) if layout.coordinates(rank).pp == layout.pp - 1]
    assert len(last) == layout.tp
    for logits in last:
        assert (logits - expected).norm() / expected.norm() < 1e-5


def test_the_keys_are_those_that_megatron_saves(converted, ranks: RankPool, tmp_path):
    ranks.run(load_and_save, 4, converted / "megatron", Layout(tp=2, pp=2), tmp_path / "saved")
    ours = FileSystemReader(converted / "megatron").read_metadata().state_dict_metadata
    theirs = FileSystemReader(tmp_path / "saved").read_metadata().state_dict_metadata
    assert theirs.keys() <= ours.keys()
    engine_only = {key for key in ours if "core_attention._extra_state" in key}
    assert ours.keys() - theirs.keys() == engine_only
    for key, stored in theirs.items():
        if hasattr(stored, "size"):
            assert (stored.size, stored.properties.dtype) == (ours[key].size, ours[key].properties.dtype), key
    # names of the Transformer Engine spec, which megatron-core's own local spec maps to as well
    for norm in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"):
        assert f"decoder.layers.{norm}" in theirs


def test_what_another_layout_saved_reads_back_the_same(converted, ranks: RankPool, tmp_path):
    saved = tmp_path / "saved"
    ranks.run(load_and_save, 4, converted / "megatron", Layout(tp=4), saved)
    (saved / "megalong.json").write_bytes((converted / "megatron" / "megalong.json").read_bytes())
    with open_weights(converted / "hf") as first, open_weights(saved) as second:
        assert not list(tensor_differences(first, second))
    megatron_to_hf(saved, tmp_path / "back")
    assert_same_files(converted / "hf", tmp_path / "back", ["model.safetensors"])


def compute_long(folder: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    module, vocab_size = load(folder, Layout(), tokens.shape[1], False)
    return rank_logits(module, vocab_size, tokens)


@pytest.mark.parametrize(
    ("rope", "window"), [("default", 32_768), ("linear", 512), ("yarn", 512), ("llama3", 512), ("longrope", 512)]
)
def test_logits_agree_with_transformers_at_both_ends_of_the_window(tmp_path, ranks: RankPool, rope, window):
    config = hf_config(
        vocab_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=window,
        rope_theta=None,
        rope_parameters={**ROPE[rope], "rope_theta": 15296098.0},
    )
    save_hf(tmp_path / "hf", config)
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    tokens = torch.randint(0, 64, (1, window), generator=torch.Generator().manual_seed(2))
    (ours,) = ranks.run(compute_long, 1, tmp_path / "megatron", tokens)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        theirs = model(tokens).logits
    for part in (slice(0, 128), slice(window - 128, window)):
        difference = (ours[:, part] - theirs[:, part]).norm() / theirs[:, part].norm()
        assert difference < 1e-5, (part, difference)


# Stages ----------------------------------------------------------------------------------------------------------


def test_an_export_has_theta_and_window_of_the_last_stage(converted, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step_00000002"
    folder.mkdir(parents=True)
    for name in names(converted / "megatron"):
        if name != "checksums.json":
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((converted / "megatron" / name).read_bytes())
    info = read_info(folder)
    trained = model_to_hf(model_from_hf(info.hf_config), theta=2804339833.0, window=8192, dtype="float32")
    (folder / "hf_files" / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    write_info(folder, replace(info, hf_config=trained, stage="1048k", step=2, seq_length=8192, theta=2804339833.0))
    write_checksums(
        folder, {n: {"bytes": (folder / n).stat().st_size, "sha256": sha256_of(folder / n)} for n in names(folder)}
    )
    (folder.parent / "latest").write_text("step_00000002\n")
    megatron_to_hf(tmp_path / "run", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == 2804339833.0  # a reader that knows only this
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 2804339833.0}  # and one that knows this
    assert LlamaConfig.from_pretrained(tmp_path / "hf").rope_parameters["rope_theta"] == 2804339833.0
    assert config["max_position_embeddings"] == 8192
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text()) == {"model_max_length": 8192}
    assert Checksums(tmp_path / "hf").check_all() == len(names(tmp_path / "hf")) - 1


NO_LIMIT = 1000000000000000019884624838656


@pytest.mark.parametrize(
    ("window", "limit", "length", "exported"),
    [
        (1048576, 8192, 4096, (1048576, 1048576)),
        (1048576, NO_LIMIT, 2000000, (NO_LIMIT, 2000000)),
        (1048576, None, None, (None, None)),
        (256, 8192, 4096, (256, 4096)),
        (512, 8192, 4096, (8192, 4096)),  # the window that they came with
    ],
)
def test_the_limits_of_an_export_follow_its_window(window, limit, length, exported):
    files = {
        "config.json": json.dumps({"max_position_embeddings": 512}).encode(),
        "tokenizer_config.json": json.dumps({"bos_token": "\u00fc", "model_max_length": limit}).encode(),
        "generation_config.json": json.dumps({"max_length": length, "top_p": 0.9}).encode(),
        "tokenizer.json": b"not looked at",
    }
    found = for_window(files, window, Path("hf_files"))
    tokenizer, generation = (json.loads(found[f"{name}_config.json"]) for name in ("tokenizer", "generation"))
    assert (tokenizer["model_max_length"], generation["max_length"]) == exported
    assert (tokenizer["bos_token"], generation["top_p"]) == ("\u00fc", 0.9)
    unchanged = [name for name in files if found[name] == files[name]]
    assert {"config.json", "tokenizer.json"} <= set(unchanged)
    assert len(unchanged) == (4 if exported == (limit, length) else len(unchanged))
    with pytest.raises(CheckpointError, match=r"hf_files/generation_config\.json is damaged"):
        for_window({**files, "generation_config.json": b"[]"}, 1024, Path("hf_files"))


def test_every_tensor_of_the_table_is_in_the_checkpoint_once(converted):
    stored = FileSystemReader(converted / "megatron").read_metadata().state_dict_metadata
    model = model_from_hf(converted / "hf")
    assert {key for key, value in stored.items() if hasattr(value, "size")} == {entry.key for entry in table(model)}
