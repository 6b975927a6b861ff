"""The command line: one message and exit code 2 for a mistake; verify and diff say what differs and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from megalong.commands.convert import app
from megalong.convert.forward import logits
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import open_weights
from tests.convert.test_convert import ROPE
from tests.llamas import hf_config, save_hf

COMMANDS = ("hf-to-megatron", "megatron-to-hf", "from-meta", "verify", "inspect", "diff")


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_hf(folder / "hf", hf_config(num_hidden_layers=2))
    hf_to_megatron(folder / "hf", folder / "megatron")
    return folder


@pytest.fixture
def other(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair / "hf", tmp_path / "other"))


def test_every_command_has_help_with_an_example():
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)
    for command in COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0
        assert f"tools/convert.py {command}" in " ".join(out.replace("│", " ").split())


def test_there_and_back_and_verified(pair, tmp_path):
    code, out, _ = run("hf-to-megatron", pair / "hf", tmp_path / "m")
    assert code == 0
    assert "peak resident memory" in out
    assert run("megatron-to-hf", tmp_path / "m", tmp_path / "h", "--max-shard-size", "100KB")[0] == 0
    assert len(list((tmp_path / "h").glob("model-*.safetensors"))) > 1
    code, out, _ = run("verify", pair / "hf", tmp_path / "h")
    assert code == 0
    assert "21 of 21 equal" in out
    assert out.count("relative 0, same argmax 100.0%") == 2


def test_a_mistake_is_one_message_and_exit_code_2(pair, tmp_path):
    for arguments, said in (
        (("hf-to-megatron", tmp_path / "nowhere", tmp_path / "m"), "config.json is missing"),
        (("hf-to-megatron", pair / "hf", pair / "megatron"), "exists already"),
        (("hf-to-megatron", pair / "hf", tmp_path / "m", "--dtype", "int8"), "dtype 'int8' is not one of"),
        (("megatron-to-hf", pair / "hf", tmp_path / "h"), "holds no whole checkpoint"),
        (("megatron-to-hf", pair / "megatron", tmp_path / "h", "--max-shard-size", "big"), "'big' is no size"),
        (("from-meta", pair / "hf", tmp_path / "h"), "params.json is missing"),
        (("verify", pair / "hf", tmp_path / "nowhere"), "there is no such folder"),
        (("inspect", tmp_path), "neither a Hugging Face directory nor a Megatron checkpoint"),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert said in err
        assert len(err.strip().splitlines()) == 1
        assert not list(tmp_path.iterdir())


def test_a_wrong_theta_is_seen_in_config_and_in_far_logits(pair, other):
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    code, out, err = run("verify", pair / "megatron", other)
    assert code == 2
    assert "do not hold the same model" in err
    assert "rope_theta: 10000.0 / 20000.0" in out
    far = next(line for line in out.splitlines() if "480" in line or "511" in line)
    assert float(far.split("relative ")[1].split(",")[0]) > 1e-3


def test_a_changed_value_is_found_with_its_place(pair, other):
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("diff", pair / "megatron", other)
    assert code == 1
    (line,) = (line for line in out.splitlines() if line.startswith("tensor"))
    assert "model.layers.1.mlp.up_proj.weight: 1 of 6,144 values differ, first at [5, 7]" in line
    assert "of the difference 1" in line
    assert run("verify", pair / "megatron", other)[0] == 2
    assert run("diff", pair / "megatron", pair / "hf")[0] == 0


def test_equal_directories_with_values_that_are_not_finite_are_the_same_model(pair, other, tmp_path):
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    tensors["lm_head.weight"][3, 0] = float("inf")
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(other, tmp_path / "twin")
    code, out, _ = run("verify", other, tmp_path / "twin")
    assert code == 0
    assert "21 of 21 equal" in out
    assert "model.layers.1.mlp.up_proj.weight: 1 values are NaN or infinite in the first" in out
    assert out.count("max abs 0, relative 0, same argmax 100.0%, 16,000 NaN or infinite") == 2
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = 0.0
    save_file(tensors, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = run("verify", other, tmp_path / "twin")
    assert code == 2
    assert "relative nan" in out


def test_inspect_says_what_it_is(pair):
    code, out, _ = run("inspect", pair / "megatron")
    assert code == 0
    for said in ("Megatron", "float32", "10000 (default)", "512 tokens", "SHA-256 of", "megatron-core"):
        assert said in out
    code, out, _ = run("inspect", pair / "hf")
    assert code == 0
    assert "not written by megalong" in out


@pytest.mark.parametrize("rope", list(ROPE))
def test_the_layer_by_layer_forward_is_transformers(tmp_path, rope):
    config = hf_config(
        num_hidden_layers=2,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=rope == "yarn",
        rope_theta=None,
        rope_parameters={**ROPE[rope], "rope_theta": 1e4},
    )
    save_hf(tmp_path / "hf", config)
    tokens, positions = torch.arange(40) * 3, torch.cat((torch.arange(20), torch.arange(492, 512)))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad(), open_weights(tmp_path / "hf") as weights:
        theirs = model(tokens[None], position_ids=positions[None]).logits[0]
        ours = logits(weights, tokens, positions)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
