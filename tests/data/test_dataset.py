"""A folder that is not whole, or not for this run, is refused by name; one that is whole reads back exactly."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megalong.data.dataset import SequenceDataset, open_dataset
from megalong.data.manifest import MANIFEST_NAME, read_manifest
from megalong.data.packing import Packer
from megalong.runtime.errors import DataError
from tests.data.folders import EOS, VOCAB, counting_documents, make_folder

L = 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_folder(tmp_path / "data", [50, 3, 9, 20, 7, 40], L, held_out=[40], file_elements=3 * (L + 1))
    return tmp_path / "data"


def test_slices_read_back_what_was_packed_across_files(folder):
    packer = Packer(L, EOS)
    rows = [r for _, d in counting_documents([50, 3, 9, 20, 7, 40]) for r in packer.add(d)] + list(packer.finish())
    dataset = SequenceDataset(folder, "train")
    assert len(dataset.manifest.train) > 1
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        assert dataset.read(i, 0, L + 1).tolist() == row.tokens.tolist()
        assert dataset.read(i, 5, 9).tolist() == row.tokens[5:9].tolist()
        assert dataset.document_starts(i).tolist() == row.starts
        assert dataset.valid_length(i) == row.valid_length


def test_the_files_are_plain_numpy_files_under_their_limit(folder):
    for file in read_manifest(folder).train:
        array = np.load(folder / file.tokens.name)
        assert array.dtype == np.int32
        assert array.shape == (file.sequences, L + 1)
        assert array.size <= 3 * (L + 1)


def test_the_same_documents_give_the_same_bytes(folder, tmp_path):
    make_folder(tmp_path / "again", [50, 3, 9, 20, 7, 40], L, held_out=[40], file_elements=3 * (L + 1))
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_fitting_folder_opens_and_verifies(folder):
    assert len(open_dataset(folder, "eval", seq_length=L, vocab_size=VOCAB + 24, min_sequences=2, verify=True)) >= 2


def _flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def _edit(folder: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    change(raw)
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


DAMAGE: list[tuple[str, Callable[[Path], object]]] = [
    ("is damaged: its checksum", lambda f: _flip(f / "train-00001.npy", -5)),
    ("it was truncated", lambda f: (f / "train-00001.npy").write_bytes((f / "train-00001.npy").read_bytes()[:-1])),
    ("no .npy header", lambda f: _flip(f / "train-00000.npy", 1)),
    ("where the manifest says int32", lambda f: _flip(f / "train-00000.npy", 22)),
    ("is not there", lambda f: (f / "train-00000.npy").unlink()),
    (r"documents.safetensors is damaged", lambda f: _flip(f / "train-00000.documents.safetensors", 0)),
    ("does not describe", lambda f: _flip(f / "train-00000.documents.safetensors", -1)),
    ("has no manifest.json", lambda f: (f / MANIFEST_NAME).unlink()),
    ("not JSON", lambda f: (f / MANIFEST_NAME).write_text('{"format": ')),
    ("of format", lambda f: _edit(f, lambda m: m.update(version=2))),
    (r"unknown keys \['windw'\]", lambda f: _edit(f, lambda m: m.update(windw=3))),
    (r"missing keys \['source'\]", lambda f: _edit(f, lambda m: m.pop("source"))),
    ("seq_length: int was expected", lambda f: _edit(f, lambda m: m.update(seq_length="16"))),
    ("contradicts itself", lambda f: _edit(f, lambda m: m["tokenizer"].update(eos_token_id=VOCAB))),
    ("not a plain file name", lambda f: _edit(f, lambda m: m["train"][0]["tokens"].update(name="../x.npy"))),
]


@pytest.mark.parametrize(("words", "damage"), DAMAGE, ids=[w for w, _ in DAMAGE])
def test_damage_is_found_at_open_and_named(folder, words, damage):
    damage(folder)
    with pytest.raises(DataError, match=words):
        open_dataset(folder, "train", seq_length=L, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("words", "demand"),
    [
        ("cut for a window of 16 tokens and the run has 32", {"seq_length": 32}),
        ("tokenizer counting .1,000 ids. and the model's vocabulary is 999", {"vocab_size": 999}),
        ("needs at least 1,000", {"min_sequences": 1000}),
    ],
)
def test_a_folder_for_another_run_is_refused_with_the_values_that_met(folder, words, demand):
    with pytest.raises(DataError, match=words):
        open_dataset(folder, "train", **{"seq_length": L, "vocab_size": VOCAB, **demand})


def test_a_missing_folder_and_a_half_written_one_are_told_apart(tmp_path):
    with pytest.raises(DataError, match=r"There is no data folder .*nowhere"):
        SequenceDataset(tmp_path / "nowhere")
    (tmp_path / "nowhere.partial").mkdir()
    with pytest.raises(DataError, match="did not finish"):
        SequenceDataset(tmp_path / "nowhere")


def test_a_token_outside_the_vocabulary_is_caught_when_it_is_read(folder):
    _edit(folder, lambda m: m["tokenizer"].update(vocab_size=20))
    dataset = SequenceDataset(folder, "train")
    with pytest.raises(DataError, match=r"token ids \d+ to \d+ in a vocabulary of 20"):
        dataset.read(len(dataset) - 1, 0, L + 1)


def test_a_writer_that_fails_leaves_nothing_under_the_final_name_and_a_rerun_succeeds(tmp_path):
    with pytest.raises(DataError, match="no eval sequence"):
        make_folder(tmp_path / "data", [50], L, held_out=[1])
    assert not (tmp_path / "data").exists()
    make_folder(tmp_path / "data", [50], L)
    assert not (tmp_path / "data.partial").exists()
    with pytest.raises(DataError, match="exists already"):
        make_folder(tmp_path / "data", [50], L)
