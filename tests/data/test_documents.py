"""The same documents in any format give the same folder; what is broken is counted by kind, too much of it stops."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from datasets import Dataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer

from megalong.data.pipeline.documents import Document, Fields
from megalong.data.pipeline.faults import CUT, Fault
from megalong.data.pipeline.inputs import Shard, shards_of
from megalong.data.pipeline.lines import read_lines
from megalong.data.pipeline.reading import read_shard
from megalong.data.pipeline.run import prepare_stage
from megalong.data.pipeline.settings import Settings
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime.errors import DataError
from megalong.runtime.resident import peak_resident_bytes
from tests.data import corpus
from tests.data.corpus import job

FIELDS = Fields("text", "meta.redpajama_set_name", None, 2**20)


@pytest.fixture(scope="module")
def of() -> list[str]:
    return corpus.texts(120)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, of) -> Path:
    return corpus.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), of)


def write_as(kind: str, folder: Path, of: list[str], tokenizer: Path) -> Path:
    """The texts below a folder in one of the formats."""
    folder.mkdir(parents=True)
    if kind in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        for i, part in enumerate((of[:50], of[50:])):
            corpus.write_lines(folder / f"{i}{kind}", [{"text": t} for t in part])
    elif kind == ".parquet":
        pq.write_table(pa.table({"other": range(len(of)), "text": of}), folder / "a.parquet", row_group_size=40)
    elif kind == "datasets":
        Dataset.from_dict({"text": of, "other": list(range(len(of)))}).save_to_disk(folder / "set", num_shards=2)
    elif kind == "texts":
        for i, text in enumerate(of):
            path = folder / f"repo{i // 30}" / f"{i:04}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    else:
        plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        builder = IndexedDatasetBuilder(str(folder / "a.bin"), dtype=np.uint16)
        for text in of:
            builder.add_document([*plain.encode(text).ids, 0], [len(plain.encode(text).ids) + 1])
        builder.finalize(str(folder / "a.idx"))
    return folder


def test_the_same_documents_in_any_format_give_the_same_sequences(tmp_path, of, tokenizer):
    found = {}
    for kind in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "datasets", "texts", "megatron"):
        source = write_as(kind, tmp_path / kind / "source", of, tokenizer)
        plan = job(
            source, tmp_path / kind / "out", tokenizer, budget="all", order="given", source_key=None, eval_fraction=0.15
        )
        manifest = prepare_stage(plan, progress=False)
        found[kind] = (manifest.train, manifest.eval)
    tokenized_hashes = found.pop("megatron")  # held out by its ids: there is no text
    assert len({repr(f) for f in found.values()}) == 1
    assert tokenized_hashes[0]


def test_a_plain_file_is_read_in_parts_and_every_line_once(tmp_path, of):
    path = corpus.write_lines(tmp_path / "a.jsonl", corpus.records(of))
    size = path.stat().st_size
    for step in (97, 1000, size):
        parts = [read_lines(path, FIELDS, start, min(start + step, size)) for start in range(0, size, step)]
        assert [d.text for part in parts for d in part] == of


BROKEN = {
    "bad_json": b'{"text": "x"\n',
    "bad_utf8": b'{"text": "caf\xe9", "meta": {"redpajama_set_name": "a"}}\n',
    "bad_character": b'{"text": "\\ud83d", "meta": {"redpajama_set_name": "a"}}\n',
    "no_text": b'{"txt": "x", "meta": {"redpajama_set_name": "a"}}\n',
    "no_source": b'{"text": "x", "meta": {}}\n',
    "too_large": b'{"text": "' + b"x" * 2**21 + b'", "meta": {"redpajama_set_name": "a"}}\n',
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_broken_lines_are_counted_by_kind_and_their_neighbours_are_read(tmp_path, suffix):
    good = b'{"text": "good", "meta": {"redpajama_set_name": "a"}}\n'
    raw = b"".join(good + line for line in BROKEN.values()) + b"[1]\n\n" + good
    path = tmp_path / f"a{suffix}"
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.compress}[suffix]
    path.write_bytes(pack(raw))
    found = list(read_lines(path, FIELDS))
    kinds = Counter(f.kind for f in found if isinstance(f, Fault))
    assert kinds == Counter([*BROKEN, "bad_json"])
    assert sum(isinstance(d, Document) for d in found) == len(BROKEN) + 1
    assert any(f.where == f"{path}:2" for f in found if isinstance(f, Fault))


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet", "datasets", "megatron"])
def test_a_file_that_was_cut_short_is_one_fault_and_what_stands_before_is_read(tmp_path, of, tokenizer, kind):
    source = write_as(kind, tmp_path / "source", [t * 5 for t in of], tokenizer)
    shard = shards_of(Settings(source=str(source)))[0][0]
    path = shard.paths[0]
    fields = Fields("text", None, None, 2**20)
    whole = list(read_shard(shard, fields, load_tokenizer(tokenizer).info))
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * 2 // 3])
    found = list(read_shard(shard, fields, load_tokenizer(tokenizer).info))
    assert [f.kind for f in found if isinstance(f, Fault)] == [CUT]
    before = [d.text for d in found if isinstance(d, Document)]
    assert all(np.array_equal(a, b.text) for a, b in zip(before, whole, strict=False))
    if kind in (".jsonl.gz", "megatron"):  # the others come in blocks, of which the only one is damaged
        assert 0 < len(before) < len(whole)
    with pytest.raises(DataError, match=r"end too early or are damaged.*data\.max_cut_files=1"):
        prepare_stage(
            job(source, tmp_path / "out", tokenizer, budget="all", source_key=None, estimate=False), progress=False
        )


def test_faults_below_the_limit_are_in_the_manifest_and_above_it_nothing_is_laid_out(tmp_path, of, tokenizer):
    source = corpus.make_shards(tmp_path / "source", corpus.records(of), 2)
    broken = b"".join(line for kind, line in BROKEN.items() if kind != "too_large")
    (source / "b.jsonl").write_bytes(broken + json.dumps(corpus.record(of[0] + "x", "RedPajamaC4")).encode() * 1)
    plan = {"budget": "all", "eval_fraction": 0.15, "estimate": False}
    with pytest.raises(DataError, match=r"most of the first documents cannot be used.*such as .*b\.jsonl:1"):
        prepare_stage(job(source, tmp_path / "out", tokenizer, **plan), progress=False)
    (source / "b.jsonl").write_bytes(
        broken + b"".join(json.dumps(corpus.record(f"{t}y", "RedPajamaC4")).encode() + b"\n" for t in of[:9])
    )
    with pytest.raises(DataError, match=r"5 of 134 documents are broken \(1 lines that are no JSON.*0\.0373"):
        prepare_stage(job(source, tmp_path / "out", tokenizer, max_fault_share=0.03, **plan), progress=False)
    assert not (tmp_path / "out").exists()
    manifest = prepare_stage(job(source, tmp_path / "out", tokenizer, max_fault_share=0.04, **plan), progress=False)
    assert manifest.made["documents"]["faults"] == {k: 1 for k in sorted(BROKEN) if k != "too_large"}
    assert any("b.jsonl:1" in e for e in manifest.made["documents"]["examples"])


def test_a_document_of_a_gigabyte_in_one_line_is_passed_over_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    good = b'{"text": "good", "meta": {"redpajama_set_name": "a"}}\n'
    with zstandard.ZstdCompressor().stream_writer(path.open("wb")) as out:
        out.write(good + b'{"text": "')
        for _ in range(1024):
            out.write(b"x" * 2**20)
        out.write(b'"}\n' + good)
    assert path.stat().st_size < 2**20
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # so that its memory is its own
        before = peak_resident_bytes()
        found = [getattr(f, "kind", "document") for f in read_lines(path, FIELDS)]
        os.write(writer, json.dumps([found, peak_resident_bytes() - before]).encode())
        os._exit(0)
    os.waitpid(child, 0)
    kinds, grown = json.loads(os.read(reader, 1000))
    assert kinds == ["document", "too_large", "document"]
    assert grown < 200 * 2**20


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a.jsonl.zst", "b.csv"], r"not read: 1 file \(\.csv\)"),
        (["a.jsonl", "b.jsonl.part"], r"not read: 1 file \(\.part\)"),
        (["a.jsonl", "a.tar"], r"\.tar"),
        (["a.txt.gz"], r"not read: 1 file \(\.gz\)"),
        (["a.bin"], r"not read: 1 file \(\.bin\)"),
        (["a.jsonl", "b.py"], r"Which is the data\?"),
        (["a.png"], "holds nothing that is read as documents"),
    ],
)
def test_data_that_is_not_read_is_never_left_out_in_silence(tmp_path, names, words):
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DataError, match=words):
        shards_of(Settings(source=str(tmp_path)))


def test_small_files_travel_in_parcels_and_large_ones_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("megalong.data.pipeline.inputs.PART", 100)
    monkeypatch.setattr("megalong.data.pipeline.inputs.PARCEL", 100)
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_bytes(b'{"text": "x"}\n' * 20)
    (tmp_path / "code" / "r").mkdir(parents=True)
    for i in range(9):
        (tmp_path / "code" / "r" / f"{i}.py").write_bytes(b"x" * 40)
    (tmp_path / "code" / "README.md").write_bytes(b"about")
    (tmp_path / "code" / "x.png").write_bytes(b"?")
    shards, left = shards_of(Settings(sources={"l": str(tmp_path / "lines"), "c": str(tmp_path / "code")}))
    assert [(s.source, s.start, s.stop) for s in shards if s.kind == "lines"] == [
        ("l", 0, 100),
        ("l", 100, 200),
        ("l", 200, 280),
    ]
    assert [len(s.files) for s in shards if s.kind == "texts"] == [4, 3, 3]
    assert [line for line in left if "x.png" in line]


def test_tokens_of_another_vocabulary_are_faults(tmp_path, tokenizer):
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for ids in ([1, 2, 0], [1, 5000, 0]):
        builder.add_document(ids, [3])
    builder.finalize(str(tmp_path / "a.idx"))
    shard = Shard("megatron", "all", str(tmp_path), ("a.bin",))
    good, bad = read_shard(shard, FIELDS, load_tokenizer(tokenizer).info)
    assert isinstance(good, Document)
    assert np.asarray(good.text).tolist() == [1, 2]
    assert isinstance(bad, Fault)
    assert bad.kind == "bad_ids"
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + b"\xff" * 60)
    with pytest.raises(DataError, match=r"a\.idx is not the \.idx of a megatron"):
        list(read_shard(shard, FIELDS, load_tokenizer(tokenizer).info))
