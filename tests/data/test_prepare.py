"""The command turns a person's text into a folder that trains, and says what is wrong with what it cannot read."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megalong.data.builtin import python_sources, train_tokenizer
from megalong.data.dataset import SequenceDataset
from megalong.data.prepare import prepare
from megalong.data.texts import texts_of
from megalong.runtime.errors import DataError
from tests.training.disks import make_read_only, small_disk

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"
L = 128


@pytest.fixture(scope="module")
def texts() -> list[str]:
    whole = [t for _, t in zip(range(4), python_sources(10**6), strict=False)]
    return [t[i : i + 3000] for t in whole for i in range(0, len(t), 3000)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, 400, folder)
    return folder


def _lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "meta": {"redpajama_set_name": "Book"}}) + "\n" for t in texts))
    return path


def test_json_lines_and_text_files_of_the_same_documents_give_the_same_sequences(tmp_path, texts, tokenizer):
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "files" / f"{i:04}.txt").write_text(text)
    _lines(tmp_path / "all.jsonl", texts)
    one = prepare(tmp_path / "files", tmp_path / "a", tokenizer, L, eval_fraction=0.2, progress=False)
    two = prepare(
        tmp_path / "all.jsonl", tmp_path / "b", tokenizer / "tokenizer.json", L, eval_fraction=0.2, progress=False
    )
    assert (one.train, one.eval) == (two.train, two.eval)


def test_the_command_writes_the_text_back_out_of_the_folder(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts)
    command = [sys.executable, str(TOOL), str(source), str(tmp_path / "data"), "--tokenizer", str(tokenizer)]
    done = subprocess.run([*command, "--seq-length", str(L), "--eval-fraction", "0.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sequences of 128 tokens to train on" in done.stdout
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    for split in ("train", "eval"):
        dataset = SequenceDataset(tmp_path / "data", split)
        for i in range(len(dataset)):
            starts = [*dataset.document_starts(i).tolist(), dataset.valid_length(i)]
            for a, b in pairwise(starts):
                piece = decode(dataset.read(i, a, b).tolist())
                assert any(piece.strip("�") in t for t in texts)


def test_a_held_out_text_is_held_out_of_every_window_and_order(tmp_path, texts, tokenizer):
    def held_out(name: str, order: list[str], seq_length: int) -> set[bytes]:
        prepare(_lines(tmp_path / f"{name}.jsonl", order), tmp_path / name, tokenizer, seq_length, eval_fraction=0.2)
        dataset = SequenceDataset(tmp_path / name, "eval")
        tokens = [dataset.read(i, 0, dataset.valid_length(i)) for i in range(len(dataset))]
        return set(np.concatenate(tokens).tobytes().split(b"\0" * 4))

    short = sum(map(len, held_out("a", texts, 64)))
    long = sum(map(len, held_out("b", texts[::-1], 256)))
    assert abs(short - long) < 0.05 * short  # rows overlap by one token, so more short rows hold a little more


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"txt": "y"}\n',
            r"a.jsonl:2 cannot be read. It is one of the documents without the text field",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"te',
            r"a.jsonl:2 cannot be read. It is one of the lines that are no JSON object",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 cannot be read. .*whose text is no string"),
        ("a.txt", b"caf\xe9 noir", r"a.txt cannot be read. It is one of the texts that are not UTF-8"),
        ("a.jsonl.zst", b"(\xb5/\xfd", r"a.jsonl.zst after line 0: compressed file ended.* cannot be read"),
        ("a.txt", b"x", "gives no (train|eval) sequence"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, tokenizer, name, content, words):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prepare(tmp_path / "source", tmp_path / "out", tokenizer, L, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jsonl.xz", "README.md"], r"data that is not read: 1 file \(\.xz\), 90 bytes, such as .*a\.jsonl\.xz"),
        (["a.jsonl", "b.tar.GZ", "c.tar.gz"], r"data that is not read: 2 files \(\.gz\)"),
        (["a.txt", "b.parquet", "c.arrow"], r"\(parquet\).*\(arrow\).*\(texts\).*Which is the data"),
        (["a.jsonl", "b.jsonl.incomplete"], r"1 file \(\.incomplete\).*finish or remove downloads"),
        (["a.jsonl", "b.txt"], r"\(lines\).*b\.txt.*Which is the data.*folder of its own"),
        (["a.png", "b.yaml"], r"nothing that is read as documents.*1 file \(\.png\).*1 file \(\.yaml\)"),
        (["a.bin", "a.idx"], "holds token ids"),
    ],
)
def test_data_that_is_not_read_is_never_left_out_in_silence(tmp_path, tokenizer, names, words):
    (tmp_path / "source").mkdir()
    for name in names:
        (tmp_path / "source" / name).write_bytes(b'{"text": "xxxxxxxxxxxxxxx"}\n\n\n' * 3)
    with pytest.raises(DataError, match=words):
        prepare(tmp_path / "source", tmp_path / "out", tokenizer, L, progress=False)
    assert not list(tmp_path.glob("out*"))


def test_what_is_about_the_data_and_other_kinds_of_files_are_left_out_and_counted(tmp_path, texts, tokenizer, capsys):
    whole = prepare(_lines(tmp_path / "all.jsonl", texts), tmp_path / "a", tokenizer, L, eval_fraction=0.2)
    source = tmp_path / "source"
    (source / ".git").mkdir(parents=True)
    _lines(tmp_path / "elsewhere.JSONL", [*texts, ""]).rename(source / "all.JSONL")
    for name in ("README.md", "LICENSE.txt", "shot.png", "config.yaml", ".git/x.jsonl"):
        (source / name).write_text("not data")
    capsys.readouterr()
    part = prepare(source, tmp_path / "b", tokenizer, L, eval_fraction=0.2, progress=False)
    assert (part.train, part.eval) == (whole.train, whole.eval)
    said = capsys.readouterr().err
    for words in (
        "2 files (text about the data), 16 bytes, such as",
        "1 file (.png), 8 bytes",
        "1 file (.yaml)",
        "1 file (hidden files)",
        f"1 of {len(texts) + 1} documents",
    ):
        assert words in said


def test_a_folder_that_is_linked_into_the_source_is_read_once(tmp_path, texts, tokenizer):
    (tmp_path / "disk").mkdir()
    _lines(tmp_path / "disk" / "all.jsonl", texts)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "source")
    assert [shard.files for shard in texts_of(tmp_path / "source").shards] == [("linked/all.jsonl",)]
    (tmp_path / "source" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"broken links.*gone\.jsonl"):
        texts_of(tmp_path / "source")


def test_sources_without_a_byte_or_that_do_not_let_themselves_be_read_are_named(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: 1 file, and nothing in it"):
        prepare(tmp_path / "empty.jsonl", tmp_path / "out", tokenizer, L, progress=False)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.txt").write_text("some text")
    (tmp_path / "source" / "b.txt").symlink_to("/proc/self/mem")  # opens, and fails to be read
    with pytest.raises(DataError, match=r"b\.txt cannot be read \(Input/output error\)"):
        prepare(tmp_path / "source", tmp_path / "out", tokenizer, L, progress=False)
    (tmp_path / "half.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"half\.jsonl:2.*surrogate"):
        prepare(tmp_path / "half.jsonl", tmp_path / "out", tokenizer, L, progress=False)


def test_a_full_and_a_read_only_disk_are_named(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts * 40)
    with small_disk(tmp_path / "disk", 1) as disk:
        with pytest.raises(DataError, match=r"disk/out could not be written \(No space left on device\)"):
            prepare(source, disk / "out", tokenizer, L, eval_fraction=0.2, progress=False)
        assert not (disk / "out").exists()
        make_read_only(disk)
        with pytest.raises(DataError, match="Read-only file system"):
            prepare(source, disk / "new", tokenizer, L, progress=False)
    with pytest.raises(DataError, match="cannot be made"):
        prepare(source, source / "below a file", tokenizer, L, progress=False)


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path, tokenizer):
    command = [sys.executable, str(TOOL), str(tmp_path / "no"), str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    done = subprocess.run([*command, "--seq-length", "64"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"There is no source {tmp_path / 'no'}."


def test_wrong_settings_are_refused_before_any_work(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts)
    for words, arguments in (
        ("eval_fraction=1.5", {"eval_fraction": 1.5}),
        ("seq_length=0", {"seq_length": 0}),
        ("There is no tokenizer at", {"tokenizer": tmp_path}),
        ("exists already", {"out": source}),
    ):
        given = {"source": source, "out": tmp_path / "out", "tokenizer": tokenizer, "seq_length": L, **arguments}
        with pytest.raises(DataError, match=words):
            prepare(**given, progress=False)


def test_a_partial_folder_of_the_persons_own_is_left_alone(tmp_path, texts, tokenizer):
    source = _lines(tmp_path / "all.jsonl", texts)
    own = tmp_path / "data.partial"
    own.mkdir()
    (own / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"data\.partial is in the way"):
        prepare(source, tmp_path / "data", tokenizer, L, eval_fraction=0.2, progress=False)
    assert [p.read_text() for p in own.iterdir()] == ["mine"]
    (own / "notes.txt").rename(own / ".megalong-partial")  # now it is what a killed writer left
    prepare(source, tmp_path / "data", tokenizer, L, eval_fraction=0.2, progress=False)
    assert not own.exists()
    assert all(not p.name.startswith(".") for p in (tmp_path / "data").iterdir())


@pytest.mark.parametrize("name", [".", "/", "all.jsonl/data", "x" * 5000])
def test_what_cannot_be_a_data_folder_is_named_before_any_work(tmp_path, monkeypatch, texts, name):
    monkeypatch.chdir(tmp_path)
    _lines(tmp_path / "all.jsonl", texts)
    with pytest.raises(DataError, match=r"is no name for a folder|is a file|cannot be made"):
        prepare(tmp_path / "all.jsonl", Path(name), tmp_path / "no tokenizer", L, progress=False)
