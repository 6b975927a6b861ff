"""No record of a checkpoint, own or foreign, can run code, even where its checksums are right: it is refused."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from typer.testing import CliRunner

from megalong.checkpoint.checksums import CHECKSUMS, write_checksums
from megalong.checkpoint.dcp_metadata import METADATA, read_metadata
from megalong.checkpoint.plain_values import holds_nothing, read_common
from megalong.commands.convert import app
from megalong.runtime.errors import CheckpointError, UserError
from megalong.runtime.files import sha256_of
from megalong.runtime.ranks import RankPool
from tests.llamas import hf_config, save_hf
from tests.training.runs import outcome_of, run_stage

TINY = ["model.num_hidden_layers=1", "model.hidden_size=64", "train.global_batch_size=1"]
WEIGHT = "decoder.layers.mlp.linear_fc2.weight"
EXTRA = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_1"
RECORDS = (METADATA, "common.pt", WEIGHT, f"optimizer.state.param.{WEIGHT}", f"optimizer.state.exp_avg.{WEIGHT}", EXTRA)
READ_BY = {"resume": RECORDS, "next stage": (METADATA, WEIGHT, RECORDS[3], EXTRA), "converter": (METADATA, WEIGHT)}


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.mark}'",)


def saved(value: Any, plainly: bool = False) -> bytes:
    """As torch.save writes it, or as a bare pickle, as it wrote once."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not plainly)
    return stream.getvalue()


def put(folder: Path, key: str, data: bytes) -> Path:
    """Let `data` stand where the checkpoint's metadata, common state or a record of a tensor or object stood."""
    if key in (METADATA, "common.pt"):
        (folder / key).write_bytes(data)
    else:
        metadata, places = read_metadata(folder)
        index, place = places[key][0]
        file = folder / place.relative_path
        assert isinstance(index, MetadataIndex)
        metadata.storage_data[index] = _StorageInfo(place.relative_path, file.stat().st_size, len(data))
        file.write_bytes(file.read_bytes() + data)
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with_right_checksums(folder)
    return folder


def with_right_checksums(folder: Path) -> None:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS]
    sums = {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}
    write_checksums(folder, sums)


@pytest.fixture(scope="module")
def run_dir(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bf16 after its first step, saved."""
    folder = tmp_path_factory.mktemp("run")
    ranks.run(run_stage, 1, str(folder), *TINY, "train.stop_after=1")
    return folder


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    mark = tmp_path / "MARK"
    yield mark
    assert not mark.exists(), "code from the file ran"


def copied(run_dir: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the run; returns its checkpoint."""
    return Path(shutil.copytree(run_dir, tmp_path / name)) / "checkpoints" / "step_00000001"


def loads(run_dir: str, folders: list[Path]) -> list[dict[str, str]]:
    """What a resume from each folder says, and what the start of another stage says."""
    from megalong.checkpoint import load
    from tests.training.runs import stage_run

    def said(load: Any) -> str:
        try:
            load()
        except UserError as error:
            return str(error)
        return "loaded"

    stage = stage_run(run_dir, *TINY)
    model, optimizer = stage.state.model, stage.state.optimizer
    found = []
    for folder in folders:
        load.verify_checksums(folder)
        resumed = said(lambda folder=folder: load.load_run(folder, model, optimizer))
        weights = said(
            lambda folder=folder: load.load_weights(folder, model) and load.load_masters(folder, model, optimizer)
        )
        found.append({"resume": resumed, "next stage": weights})
    return found


def named(record: str) -> str:
    """What an error about a record must name."""
    return record.split("/")[0]


@pytest.mark.parametrize("plainly", [False, True], ids=["archive", "bare pickle"])
def test_the_trainer_refuses_code_in_every_record(
    run_dir: Path, ranks: RankPool, tmp_path: Path, mark: Path, plainly: bool
) -> None:
    folders = [copied(run_dir, tmp_path, "whole")]
    for number, record in enumerate(RECORDS):
        data = pickle.dumps(Evil(mark)) if record == METADATA else saved([Evil(mark)], plainly)
        folders.append(put(copied(run_dir, tmp_path, str(number)), record, data))
    (whole, *hostile), *_ = ranks.run(loads, 1, str(tmp_path / "new"), folders)
    assert whole == {"resume": "loaded", "next stage": "loaded"}
    for record, outcome in zip(RECORDS, hostile, strict=True):
        for reader in ("resume", "next stage"):
            if record in READ_BY[reader]:
                assert named(record) in outcome[reader], (reader, record, outcome)
            else:
                assert outcome[reader] == "loaded", (reader, record, outcome)


@pytest.mark.parametrize("record", [METADATA, EXTRA])
def test_a_run_that_is_given_such_a_checkpoint_ends_with_one_message(
    run_dir: Path, ranks: RankPool, tmp_path: Path, mark: Path, record: str
) -> None:
    data = pickle.dumps(Evil(mark)) if record == METADATA else saved([Evil(mark)])
    folder = put(copied(run_dir, tmp_path, "hostile"), record, data)
    (resumed,) = ranks.run(outcome_of, 1, str(folder.parents[1]), *TINY)
    assert resumed.startswith("CheckpointError")
    assert named(record) in resumed
    (begun,) = ranks.run(outcome_of, 1, str(tmp_path / "next"), *TINY, f"init_from={folder}", stage="262k")
    assert begun.startswith("CheckpointError")
    assert named(record) in begun


@pytest.mark.parametrize("record", RECORDS)
def test_the_converter_refuses_code_in_what_it_reads_and_leaves_the_rest_alone(
    run_dir: Path, tmp_path: Path, mark: Path, record: str
) -> None:
    whole = run_dir / "checkpoints" / "step_00000001"
    data = pickle.dumps(Evil(mark)) if record == METADATA else saved([Evil(mark)])
    folder = put(copied(run_dir, tmp_path, "hostile"), record, data)
    commands = [
        ["megatron-to-hf", folder, tmp_path / "hf"],
        ["verify", folder, whole, "--no-logits"],
        ["verify", whole, folder, "--no-logits"],
        ["diff", folder, whole],
        ["inspect", folder, "--no-check"],
    ]
    for command in commands:
        result = CliRunner().invoke(app, [str(word) for word in command])
        reads = record in READ_BY["converter"] and not (command[0] == "inspect" and record == WEIGHT)
        assert result.exit_code == (2 if reads else 0), (command, result.output)
        assert not reads or named(record) in result.stderr, (command, result.stderr)
        assert result.exception is None or isinstance(result.exception, SystemExit), command


def test_pickled_weights_of_hugging_face_and_of_meta_run_nothing(tmp_path: Path, mark: Path) -> None:
    save_hf(tmp_path / "hf", hf_config(num_hidden_layers=1))
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(mark)}, tmp_path / "hf" / "pytorch_model.bin")
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save({"norm.weight": Evil(mark)}, meta / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 256, "multiple_of": 32, "norm_eps": 1e-5}
    (meta / "params.json").write_text(json.dumps(params))
    for command in (["hf-to-megatron", tmp_path / "hf"], ["from-meta", meta, "--window", 512]):
        result = CliRunner().invoke(app, [str(word) for word in (command[0], *command[1:2], tmp_path / "out")] + [
            str(word) for word in command[2:]
        ])  # fmt: skip
        assert result.exit_code == 2, result.output
        assert "pytorch_model.bin" in result.stderr or "consolidated.00.pth" in result.stderr, result.stderr


@pytest.mark.parametrize(
    "nothing",
    [None, [None], [], [torch.empty(0, dtype=torch.uint8)], [io.BytesIO(saved(None))]],
    ids=["None", "[None]", "[]", "[no bytes]", "[None saved]"],
)
def test_an_extra_state_that_holds_nothing_is_accepted(nothing: Any) -> None:
    assert holds_nothing(saved(nothing))


def test_an_extra_state_that_holds_anything_is_refused(
    run_dir: Path, ranks: RankPool, tmp_path: Path, mark: Path
) -> None:
    things = [{"scale": 1.0}, [torch.ones(1)], [io.BytesIO(saved(Evil(mark)))], [torch.ones(100_000)]]
    folders = [put(copied(run_dir, tmp_path, str(n)), EXTRA, saved(thing)) for n, thing in enumerate(things)]
    folders.append(put(copied(run_dir, tmp_path, "no archive"), EXTRA, b"PK\x03\x04 and then nothing"))
    for outcome in ranks.run(loads, 1, str(tmp_path / "new"), folders)[0]:
        for said in outcome.values():
            assert "distcp: decoder.layers.mlp.linear_fc2._extra_state/shard_0_1 holds something" in said
            assert "FP8 statistics and other extra states are not read" in said


def edited(common: dict[str, Any], what: str) -> Any:
    """The common state of a run with one thing that no run writes."""
    group = common["optimizer"]["common"]["optimizer"]["param_groups"][0]
    if what == "a list":
        return [common]
    if what == "no optimizer":
        common.pop("optimizer")
    elif what == "a text for a number":
        group["eps"] = "small"
    elif what == "a number that is none":
        group["betas"] = (0.9, float("nan"))
    elif what == "a text for the step":
        common["state"]["step"] = "1"
    elif what == "a tensor":
        common["state"]["evaluation"] = torch.ones(3)
    return common


def test_a_common_state_of_another_shape_is_named(run_dir: Path, ranks: RankPool, tmp_path: Path) -> None:
    whole = read_common(run_dir / "checkpoints" / "step_00000001")
    kinds = (
        "a list",
        "no optimizer",
        "a text for a number",
        "a number that is none",
        "a text for the step",
        "a tensor",
    )
    folders = [
        put(copied(run_dir, tmp_path, what), "common.pt", saved(edited(copy.deepcopy(whole), what)))
        for what in (*kinds, "nothing")
    ]
    *found, unchanged = ranks.run(loads, 1, str(tmp_path / "new"), folders)[0]
    for what, outcome in zip(kinds, found, strict=True):
        assert "common.pt" in outcome["resume"], what
        assert outcome["next stage"] == "loaded"
    assert unchanged["resume"] == "loaded"


def test_a_record_that_was_changed_is_found_by_its_own_checksum(run_dir: Path, ranks: RankPool, tmp_path: Path) -> None:
    folder = copied(run_dir, tmp_path, "run")
    place = read_metadata(folder)[1][WEIGHT][0][1]
    file = folder / place.relative_path
    data = bytearray(file.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    file.write_bytes(data)
    with_right_checksums(folder)
    (outcome,) = ranks.run(loads, 1, str(tmp_path / "new"), [folder])[0]
    for said in outcome.values():
        assert f"tensor {WEIGHT}" in said
        assert "CRC-32 differs" in said


def test_a_checkpoint_without_checksums_is_no_start(run_dir: Path, tmp_path: Path) -> None:
    from megalong.checkpoint.load import verify_checksums

    folder = copied(run_dir, tmp_path, "run")
    (folder / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="was not written by megalong"):
        verify_checksums(folder)
