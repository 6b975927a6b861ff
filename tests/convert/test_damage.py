"""Damage is found and named, and nothing is left under the target's name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalong.convert import output_folder
from megalong.convert.to_hf import megatron_to_hf
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import open_weights
from megalong.runtime.errors import CheckpointError, ThetaError, UserError
from tests.llamas import hf_config, save_hf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ as transformers writes it, megatron/ made from it, and export/ made from that, in several shards."""
    folder = tmp_path_factory.mktemp("whole")
    save_hf(folder / "hf", hf_config(num_hidden_layers=2), torch.bfloat16, max_shard_size=70_000)
    hf_to_megatron(folder / "hf", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "export", 70_000)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    for name in ("hf", "megatron", "export"):
        shutil.copytree(whole / name, tmp_path / name)
    return tmp_path


def refused(convert: Callable[[Path, Path], None], source: Path, said: str, kind: type[UserError] = CheckpointError):
    target = source.parent / "target"
    with pytest.raises(kind, match=said):
        convert(source, target)
    assert not target.exists()
    assert not target.with_name("target.partial").exists()


def flip(file: Path, at: int, bit: int = 0x10) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ bit]))


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_sums(folder: Path) -> Path:
    (folder / "checksums.json").unlink(missing_ok=True)
    return folder


# Hugging Face directories ----------------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_shard_is_found_by_its_checksum(copy):
    file = shard(copy / "export")
    flip(file, file.stat().st_size - 5)
    refused(hf_to_megatron, copy / "export", rf"{file.name} was changed after it was written")


def test_a_truncated_shard_is_found_without_checksums_too(copy):
    file = shard(copy / "hf")
    os.truncate(file, file.stat().st_size - 2)
    refused(hf_to_megatron, copy / "hf", rf"{file.name} is cut short")
    os.truncate(file, 5)
    refused(hf_to_megatron, copy / "hf", rf"{file.name} is not a whole safetensors file")


def test_a_missing_shard_is_named(copy):
    file = shard(copy / "hf")
    file.unlink()
    refused(hf_to_megatron, copy / "hf", rf"{file.name} missing")


def test_a_damaged_header_is_named(copy):
    flip(shard(copy / "hf"), 6, 0xFF)  # the length becomes absurd
    refused(hf_to_megatron, copy / "hf", "is not a whole safetensors file")


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda t: t.update(extra=torch.zeros(2)), "holds tensor extra, which .* does not know"),
        (lambda t: t.pop(next(iter(t))), "does not hold tensor model"),
    ],
    ids=["unknown to the index", "gone"],
)
def test_shards_and_index_must_agree(copy, edit, said):
    change(shard(copy / "hf"), edit)
    refused(hf_to_megatron, copy / "hf", said)


def test_a_duplicate_tensor_is_named(copy):
    name = next(iter(load_file(shard(copy / "hf", 0))))
    change(shard(copy / "hf", 1), lambda t: t.update({name: torch.zeros(2)}))
    refused(hf_to_megatron, copy / "hf", rf"tensor {name} is also in model-00001")


def test_a_name_that_appears_twice_in_one_header_is_found(copy):
    save_hf(copy / "one", hf_config(num_hidden_layers=1))
    file = copy / "one" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"self_attn.k_proj", b"self_attn.v_proj", 1))
    refused(hf_to_megatron, copy / "one", r"v_proj\.weight appears twice")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\..* is unexpected"),
        ({"intermediate_size": 95}, r"mlp\..* has shape \[96, 64\], but config\.json asks for \[95, 64\]"),
        ({"attention_bias": True}, r"q_proj\.bias .*is missing"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from the embedding"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(copy, changes, said):
    edit_json(copy / "hf" / "config.json", **changes)
    refused(hf_to_megatron, copy / "hf", said)


def test_mixed_dtypes_need_a_decision(copy):
    change(shard(copy / "hf"), lambda t: t.update({k: v.float() for k, v in t.items() if "norm" in k}))
    refused(hf_to_megatron, copy / "hf", r"norm\.weight has dtype float32, but .* bfloat16\. Give --dtype")


def test_an_integer_tensor_is_refused(copy):
    change(shard(copy / "hf"), lambda t: t.update({next(iter(t)): torch.zeros(2, dtype=torch.int8)}))
    refused(hf_to_megatron, copy / "hf", "has dtype I8")


def test_pickled_weights_are_refused_with_the_reason(copy):
    for file in (copy / "hf").glob("model*"):
        file.unlink()
    torch.save({}, copy / "hf" / "pytorch_model.bin")
    refused(hf_to_megatron, copy / "hf", r"pickled weights \(pytorch_model\.bin\)\. Unpickling runs code")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_their_place(copy, value):
    name = "model.layers.1.mlp.up_proj.weight"
    file = next(f for f in (copy / "hf").glob("*.safetensors") if name in load_file(f))
    change(file, lambda t: t[name][5, 7:9].fill_(value))
    said = rf"{name} has 2 of 6,144 values that are not finite in rows 0 to 95, the first at \[5, 7\]"
    refused(hf_to_megatron, copy / "hf", rf"{said}: {value}")
    refused(lambda a, b: hf_to_megatron(a, b, dtype="float32"), copy / "hf", said)


def test_values_that_a_cast_makes_infinite_are_refused(copy):
    name = "model.norm.weight"
    file = next(f for f in (copy / "hf").glob("*.safetensors") if name in load_file(f))
    change(file, lambda t: t[name][3].fill_(70144.0))
    said = rf"tensor {name} has the value 70144 at \[3\], which becomes inf in float16\. Choose a --dtype"
    refused(lambda a, b: hf_to_megatron(a, b, dtype="float16"), copy / "hf", said)
    hf_to_megatron(copy / "hf", copy / "wide", dtype="float32")
    refused(lambda a, b: megatron_to_hf(a, b, dtype="float16"), copy / "wide", said)


def test_every_listed_file_of_a_directory_is_checked_and_every_other_is_named(copy):
    """config.json, tokenizer and generation files have no checksum of their own as tensors' headers do."""
    export = copy / "export"
    for name in ("config.json", "generation_config.json"):
        content = (export / name).read_bytes()
        (export / name).write_bytes(content.replace(b"1", b"2", 1))
        refused(hf_to_megatron, export, rf"{name} was changed after it was written")
        if name == "config.json":
            with pytest.raises(CheckpointError, match=rf"{name} was changed"):
                open_weights(export)
        (export / name).write_bytes(content)
    for name in ("tokenizer.json", "model-00009-of-00009.safetensors", "sub/tokenizer.model", ".metadata"):
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text("{}")
        refused(hf_to_megatron, export, rf"{name} is not in .*checksums\.json")
        (export / name).unlink()
    (export / "generation_config.json").rename(copy / "gone")
    refused(hf_to_megatron, export, r"generation_config\.json is missing, which checksums\.json lists")
    (copy / "gone").rename(export / "generation_config.json")
    for name in ("README.md", "LICENSE", ".gitattributes", ".DS_Store", ".nfs000012", ".cache"):
        (export / name).write_text("of other programs")
    hf_to_megatron(export, copy / "target")
    (export / "checksums.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it lists no file"):
        hf_to_megatron(export, copy / "other")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_a_checkpoint_carries_is_checked_before_it_is_used(copy, name):
    path = copy / "megatron" / "hf_files" / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    refused(megatron_to_hf, copy / "megatron", rf"{name} was changed after it was written")
    path.unlink()
    refused(megatron_to_hf, copy / "megatron", rf"{name} is missing")
    (copy / "megatron" / "hf_files" / "merges.txt").write_text("planted")
    without = json.loads((copy / "megatron" / "checksums.json").read_text())
    del without[f"hf_files/{name}"]
    (copy / "megatron" / "checksums.json").write_text(json.dumps(without))
    refused(megatron_to_hf, copy / "megatron", r"merges\.txt is not in .*checksums\.json")


def test_an_incomplete_rope_dict_is_refused(copy):
    edit_json(copy / "hf" / "config.json", rope_scaling={"rope_type": "yarn", "factor": 8.0})
    refused(hf_to_megatron, copy / "hf", "original_max_position_embeddings", ThetaError)


# Megatron checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sums", [True, False], ids=["with checksums", "as the trainer saves"])
def test_a_flipped_byte_in_a_checkpoint_file_is_found(copy, sums):
    source = copy / "megatron" if sums else without_sums(copy / "megatron")
    file = source / "__0_1.distcp"
    flip(file, file.stat().st_size // 2)
    refused(megatron_to_hf, source, r"__0_1\.distcp: tensor decoder\.layers\..* was changed after it was written")


def test_any_flipped_byte_of_a_record_is_found_or_harmless(copy):
    """A byte of the archive around a tensor may be one that nobody reads; then the tensors must be right."""
    source = without_sums(copy / "megatron")
    file = source / "__0_3.distcp"
    size, found = file.stat().st_size, []
    reference = load_all(copy / "export")
    for step in range(40):
        at = step * size // 40
        flip(file, at)
        try:
            megatron_to_hf(source, copy / "out", 10**9, overwrite=True)
            out = load_file(copy / "out" / "model.safetensors")
            assert all(torch.equal(out[n].view(torch.int16), t.view(torch.int16)) for n, t in reference.items())
        except CheckpointError as error:
            found.append(str(error))
        flip(file, at)
    assert len(found) > 30
    assert all("__0_3.distcp" in text for text in found)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def test_a_truncated_or_missing_checkpoint_file_is_named(copy):
    file = copy / "megatron" / "__0_2.distcp"
    os.truncate(file, file.stat().st_size - 1)
    refused(megatron_to_hf, copy / "megatron", r"__0_2\.distcp is cut short")
    file.unlink()
    refused(megatron_to_hf, copy / "megatron", r"__0_2\.distcp is missing")


@pytest.mark.parametrize("name", ["metadata.json", "megalong.json", ".metadata"])
def test_a_checkpoint_without_its_marks_is_not_whole(copy, name):
    (copy / "megatron" / name).unlink()
    refused(megatron_to_hf, copy / "megatron", "missing")


@pytest.mark.parametrize("name", ["metadata.json", "megalong.json", ".metadata"])
def test_a_damaged_mark_is_named(copy, name):
    path = without_sums(copy / "megatron") / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(megatron_to_hf, copy / "megatron", rf"{name} is damaged")


def test_metadata_that_would_run_code_is_refused(copy):
    source = without_sums(copy / "megatron")
    (source / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    refused(megatron_to_hf, source, r"os\.system has no place")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format_version": 1}', b"\xff", b"[]"])
def test_a_record_that_makes_no_sense_is_named(copy, content):
    (without_sums(copy / "megatron") / "megalong.json").write_bytes(content)
    refused(megatron_to_hf, copy / "megatron", r"megalong\.json is damaged")


@pytest.mark.parametrize("changes", [{"step": "4"}, {"theta": None}, {"hf_config": []}, {"seq_length": True}])
def test_a_contents_of_wrong_types_is_named(copy, changes):
    edit_json(without_sums(copy / "megatron") / "megalong.json", **changes)
    refused(megatron_to_hf, copy / "megatron", r"megalong\.json is damaged")


def test_a_record_that_contradicts_the_tensors_is_refused(copy):
    source = without_sums(copy / "megatron")
    info = json.loads((source / "megalong.json").read_text())
    info["hf_config"]["intermediate_size"] = 100
    (source / "megalong.json").write_text(json.dumps(info))
    refused(
        megatron_to_hf, source, r"linear_fc1\.weight has shape \[2, 192, 64\], but megalong\.json asks for \[2, 200"
    )


@pytest.mark.parametrize("name", ["hf", "megatron", "export"])
def test_inspection_finds_any_flipped_byte(copy, name):
    folder = copy / name
    if name == "hf":
        with open_weights(folder) as weights:
            assert "not written by megalong" in weights.check_files()
        return
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json"):
        flip(file, file.stat().st_size // 3)
        with pytest.raises(UserError, match=file.name), open_weights(folder) as weights:
            weights.check_files()
        flip(file, file.stat().st_size // 3)


# The target ------------------------------------------------------------------------------------------------------


def test_an_existing_target_is_refused_and_untouched(copy):
    target = copy / "target"
    shutil.copytree(copy / "megatron", target)
    before = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"exists already\. .*--overwrite"):
        hf_to_megatron(copy / "hf", target)
    flip(shard(copy / "export"), 2000)
    with pytest.raises(CheckpointError, match="was changed"):
        hf_to_megatron(copy / "export", target, overwrite=True)
    assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == before
    hf_to_megatron(copy / "hf", target, dtype="float16", overwrite=True)
    with open_weights(target) as weights:
        assert weights.config["dtype"] == "float16"
    assert sorted(p.name for p in copy.iterdir()) == ["export", "hf", "megatron", "target"]


def test_two_conversions_to_one_place_cannot_run_at_once(copy):
    with (
        output_folder.OutputFolder(copy / "target", 0),
        pytest.raises(CheckpointError, match="another program is writing"),
    ):
        hf_to_megatron(copy / "hf", copy / "target")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_ends_with_one_message_and_nothing_left(copy, small_disk, monkeypatch, foreseen):
    if not foreseen:  # as when someone else fills it meanwhile
        usage = shutil.disk_usage("/")._replace(free=1 << 40)
        monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)
    said = "GB free, but" if foreseen else "the disk .* is full"
    for convert, source in ((hf_to_megatron, "hf"), (megatron_to_hf, "megatron")):
        with pytest.raises(CheckpointError, match=said):
            convert(copy / source, small_disk / "target")
        assert not list(small_disk.iterdir())
