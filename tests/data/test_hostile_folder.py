"""Whatever lies in a data folder or a tokenizer's, it reads as it was written or ends in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from tokenizers import Tokenizer, models

from megalong.data.dataset import SequenceDataset
from megalong.data.manifest import MANIFEST_NAME, read_manifest
from megalong.data.texts import texts_of
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime.errors import DataError
from megalong.runtime.json_file import shown
from tests.data.folders import make_folder
from tests.hostile import RAW, as_bytes, damaged, mutated, read_or_refused

L = 16
TOKENS, SIDECAR = "train-00000.npy", "train-00000.documents.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "whole"
    make_folder(folder, [50, 3, 9, 20], L, held_out=[40])
    return folder


def read(folder: Path) -> list[Any]:
    dataset = SequenceDataset(folder, "train")
    return [
        [dataset.read(i, 0, L + 1).tolist(), dataset.document_starts(i).tolist(), dataset.valid_length(i)]
        for i in range(len(dataset))
    ]


def copied(whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    folder = Path(tmp_path_factory.getbasetemp()) / name
    if not folder.is_dir():
        shutil.copytree(whole, folder)
    return folder


def with_right_size(folder: Path, name: str, content: bytes) -> None:
    """Replace a file, and say so in the manifest."""
    (folder / name).write_bytes(content)
    raw = json.loads((folder / MANIFEST_NAME).read_text())
    raw["train"][0]["tokens" if name == TOKENS else "documents"]["bytes"] = len(content)
    (folder / MANIFEST_NAME).write_text(json.dumps(raw))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_a_manifest_gives_the_same_sequences_or_one_message(whole, tmp_path_factory, data):
    folder = copied(whole, tmp_path_factory, "manifest")
    document = json.loads((whole / MANIFEST_NAME).read_text())
    content = data.draw(mutated(document).map(as_bytes) | damaged(as_bytes(document)))
    (folder / MANIFEST_NAME).write_bytes(content)
    found, refused = read_or_refused(lambda: read(folder))
    assert refused or found == read(whole) or read_manifest(folder).train != read_manifest(whole).train


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from([TOKENS, SIDECAR]))
def test_any_change_of_a_file_gives_sequences_or_one_message(whole, tmp_path_factory, data, name):
    folder = copied(whole, tmp_path_factory, "files")
    for file in (TOKENS, SIDECAR, MANIFEST_NAME):
        shutil.copyfile(whole / file, folder / file)
    with_right_size(folder, name, data.draw(damaged((whole / name).read_bytes()[:400])))
    read_or_refused(lambda: read(folder))


BAD_FIELDS: list[tuple[str, Any]] = [
    *(("seq_length", v) for v in ["16", 0, -1, 2**31, 10**400, True, None, 16.0]),
    *(("train", v) for v in [None, {}, 3, [3], ["x"], [[]], [{}]]),
    *(("tokenizer", v) for v in [None, [], "x", {"name": "x"}]),
    *(("version", v) for v in [True, "1", [1], None]),
    *(("source", v) for v in [3, RAW[0], RAW[3], RAW[4], RAW[5]]),
]


@pytest.mark.parametrize(("key", "value"), BAD_FIELDS, ids=shown)
def test_a_field_of_the_manifest_of_a_wrong_type_is_refused(whole, tmp_path, key, value):
    document = json.loads((whole / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_bytes(as_bytes({**document, key: value}))
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "/etc/passwd", "a/b", "a\0b", "x" * 5000, "\ud800"], ids=shown)
def test_a_file_name_that_leads_elsewhere_is_refused(whole, tmp_path, name):
    document = json.loads((whole / MANIFEST_NAME).read_text())
    document["train"][0]["tokens"]["name"] = name
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(DataError, match="not a plain file name"):
        read_manifest(tmp_path)


def npy(header: bytes, rows: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + rows


@pytest.mark.parametrize(
    "header",
    [
        b"(" * 900,
        b"-" * 900 + b"1",
        b"[" * 60_000,
        b"__import__('os').system('true')",
        b"{[]: 1}",
        b"{'descr': " + b"9" * 900 + b"}",
        b"\xff\xfe",
        b"\x00",
        b"",
    ],
    ids=["brackets", "signs", "long", "a call", "a list as a name", "digits", "no text", "zero", "empty"],
)
def test_a_hostile_header_of_tokens_is_refused(whole, tmp_path, header):
    shutil.copytree(whole, tmp_path / "data")
    with_right_size(tmp_path / "data", TOKENS, npy(header))
    with pytest.raises(DataError, match=rf"{TOKENS} (is damaged: no .npy header|holds)"):
        read(tmp_path / "data")


def test_a_file_of_fewer_tokens_than_its_header_says_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    with_right_size(tmp_path / "data", TOKENS, (whole / TOKENS).read_bytes()[:-4])
    with pytest.raises(DataError, match=r"which are not \d+ rows of 17 int32"):
        read(tmp_path / "data")


def sidecar(**header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


ENTRY = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        sidecar(starts={**ENTRY, "dtype": ["I64"]}),
        sidecar(starts={**ENTRY, "shape": [2**70]}),
        sidecar(starts={**ENTRY, "data_offsets": [8, 0]}),
        sidecar(starts={**ENTRY, "dtype": "F8_E8M0", "shape": [8]}),
        sidecar(starts={**ENTRY, "dtype": "F4", "shape": [16]}),
        sidecar(starts=3),
        sidecar(**{"": ENTRY}),
        (2**63).to_bytes(8, "little"),
        b"",
        save(
            {"starts": np.zeros(0, np.int64), "offsets": np.zeros(0, np.int64), "valid_lengths": np.ones(0, np.int64)}
        ),
        save({"starts": np.ones(1), "offsets": np.ones(1), "valid_lengths": np.ones(1)}),
        save({"starts": np.zeros((1, 1), np.int64), "offsets": np.int64([0]), "valid_lengths": np.int64([1])}),
    ],
    ids=range(12),
)
def test_a_hostile_sidecar_is_refused(whole, tmp_path, content):
    shutil.copytree(whole, tmp_path / "data")
    with_right_size(tmp_path / "data", SIDECAR, content)
    with pytest.raises(DataError, match=rf"{SIDECAR} (is damaged|does not describe)"):
        read(tmp_path / "data")


# Tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_json() -> str:
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a")).to_str()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_a_tokenizer_loads_or_is_one_message(tmp_path_factory, data):
    folder = Path(tmp_path_factory.getbasetemp()) / "tokenizer"
    folder.mkdir(exist_ok=True)
    document = json.loads(tokenizer_json())
    (folder / "tokenizer.json").write_bytes(
        data.draw(mutated(document).map(as_bytes) | damaged(tokenizer_json().encode()))
    )
    (folder / "tokenizer_config.json").write_bytes(data.draw(mutated({"eos_token": {"content": "b"}}).map(as_bytes)))
    found, refused = read_or_refused(lambda: load_tokenizer(folder))
    assert refused or 0 <= found.info.eos_token_id < found.info.vocab_size


NAMES = [3, ["b"], True, {"content": 3}, {"content": ["b"]}, "unknown", RAW[0], RAW[3]]
CONFIGS = [b"", b"[]", b"3", b"\xff", as_bytes(RAW[4]), *(as_bytes({"eos_token": name}) for name in NAMES)]


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_a_tokenizer_config_of_wrong_types_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", as_bytes(RAW[4]), b'{"model": 3}'], ids=range(6))
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_words_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(Tokenizer(models.WordLevel({}, unk_token="a")).to_str())
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", [RAW[3], RAW[4], 3, None, "\ud800"], ids=shown)
def test_a_line_of_text_that_is_none_is_named(tmp_path, text):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + as_bytes({"text": text}))
    with pytest.raises(DataError, match=r"a\.jsonl:2 cannot be read"):
        list(texts_of(tmp_path / "a.jsonl").read())
