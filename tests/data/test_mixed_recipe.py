"""A recipe of several windows: whole steps of each, each document in one of them, and a run reads what was laid out."""

import dataclasses
import hashlib
from itertools import islice
from pathlib import Path

import pytest

from megalong.data.cursor import Cursor
from megalong.data.loader import training_batches
from megalong.data.manifest import read_manifest
from megalong.data.pipeline.checking import check_folder
from megalong.data.pipeline.job import Job
from megalong.data.pipeline.run import prepare_stage
from megalong.data.pipeline.settings import Band, Recall
from megalong.data.windows import open_windows
from megalong.recipe.preparation import job_of
from megalong.runtime.errors import ConfigError, DataError
from tests.data import corpus
from tests.data.corpus import WINDOW, documents_in

SHORT, EDGE, BATCH = 16, 200, 4
LONG_BAND = {"source": "*", "min_tokens": EDGE, "share": 0.8}
SHORT_BAND = {"source": "*", "max_tokens": EDGE, "share": 0.2, "window": SHORT}
REPO = Path(__file__).parents[2]
EXAMPLE = [
    *("+stage=65k", "+scale=mini", "data=slimpajama", f"data.source={REPO}/examples/slimpajama", "data.out=x"),
    f"data.tokenizer={REPO}/examples/tokenizer",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return corpus.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), corpus.texts())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return corpus.make_shards(tmp_path_factory.mktemp("source") / "slimpajama", corpus.records(corpus.texts()))


def mixed(source: Path, out: Path, tokenizer: Path, mix=(LONG_BAND, SHORT_BAND), *, sequences=40, **more) -> Job:
    """40 sequences in steps of 4: eight steps of the window and two of packed sequences, or what is said."""
    plan = corpus.job(source, out, tokenizer, sequences=sequences, mix=[Band(**band) for band in mix], **more)
    return dataclasses.replace(plan, batch=BATCH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source, tokenizer) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    prepare_stage(mixed(source, out, tokenizer), progress=False)
    return out


def test_every_window_has_the_tokens_of_its_steps_and_the_documents_of_its_lengths(folder):
    manifest = read_manifest(folder)
    (other,) = manifest.others
    assert (manifest.steps, other.steps, other.seq_length) == (4, 1, SHORT)
    inner = read_manifest(folder / other.folder)
    assert manifest.sequences("train") == 8 * BATCH
    assert inner.sequences("train") == 2 * BATCH * WINDOW // SHORT
    for found, tokens in ((manifest, 8 * BATCH * WINDOW), (inner, 2 * BATCH * WINDOW)):
        assert sum(found.made["tokens"].values()) == tokens
        assert [part["tokens"] for part in found.made["parts"]] == [tokens]
    long, short = documents_in(folder), documents_in(folder / other.folder)
    assert all(len(d) > EDGE for d in long[:-1])  # the last one of each is cut where its tokens are complete
    assert all(len(d) <= EDGE for d in short[:-1])
    whole = {tuple(d) for d in [*long[:-1], *short[:-1]]}
    assert len(whole) == len(long) + len(short) - 2


def test_a_run_of_as_many_steps_reads_all_of_it_once(folder):
    data = open_windows(folder, "train", seq_length=WINDOW, vocab_size=1000, min_samples=BATCH)
    assert data.steps_of(10) == [8, 2]
    reader = training_batches(
        data, cursor=Cursor.at_start(data), seed=1, micro_batches=BATCH, dp_rank=0, dp_size=1, cp_rank=0, cp_size=1
    )
    rows = {0: [], 1: []}
    for number, batch in enumerate(islice(reader, 10 * BATCH)):
        part = data.part_of(number // BATCH)
        assert (batch["document_starts"] is None) == (part == 0)
        rows[part] += [tuple(row.tolist()) for row in batch["tokens"][0].view(-1, data.parts[part].window)]
    for part, found in rows.items():
        dataset = data.parts[part].dataset
        assert sorted(found) == sorted(
            tuple(dataset.read(i, 0, dataset.seq_length).tolist()) for i in range(len(dataset))
        )


def test_a_mixed_folder_is_the_same_bytes_from_any_number_of_processes(folder, source, tokenizer, tmp_path):
    def digests(of: Path) -> dict[str, str]:
        files = [p for p in of.rglob("*") if p.is_file()]
        return {p.relative_to(of).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    prepare_stage(mixed(source, tmp_path / "out", tokenizer, workers=2), progress=False)
    assert digests(tmp_path / "out") == digests(folder)
    assert len(digests(folder)) == 10


def test_check_reads_every_byte_of_every_window(folder, tokenizer, tmp_path):
    said = list(check_folder(folder, tokenizer))
    assert f"steps alternate, in a round 4 of window {WINDOW}, 1 of {SHORT}, packed (window-{SHORT})" in said[0]
    assert sum("checksums, ids and boundaries are sound" in line for line in said) == 4
    file = folder / f"window-{SHORT}" / "train-00000.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"window-{SHORT}/train-00000.npy is damaged"):
        list(check_folder(folder, tokenizer))
    file.write_bytes(good)


def test_recall_goes_into_sequences_of_the_stages_window(source, tokenizer, tmp_path):
    plan = mixed(source, tmp_path / "out", tokenizer, recall=Recall(share=0.25, facts=1))
    plan = dataclasses.replace(plan, seq_length=512, sequences=12, batch=3)
    made = prepare_stage(plan, progress=False).made
    assert made["tokens"]["recall"] > 0
    assert "recall" not in read_manifest(tmp_path / "out" / f"window-{SHORT}").made["tokens"]


@pytest.mark.parametrize(
    ("mix", "more", "words"),
    [
        ((LONG_BAND, SHORT_BAND | {"window": 24}), {}, r"data.mix\[1\].window=24: sequences of it do not fill"),
        ((LONG_BAND, SHORT_BAND | {"window": WINDOW}), {}, "do not fill the stage's window of 64"),
        ((LONG_BAND | {"share": 0.97}, SHORT_BAND | {"share": 0.03}), {}, "of 10 steps the share of window 16 is none"),
        ((LONG_BAND | {"window": 32}, SHORT_BAND), {}, "of 10 steps the share of window 64 is none"),
        ((LONG_BAND, SHORT_BAND), {"sequences": 42}, "data.sequences=42: steps are of 4 sequences"),
    ],
)
def test_windows_that_no_step_can_read_are_refused_before_work(source, tokenizer, tmp_path, mix, more, words):
    with pytest.raises(ConfigError, match=words):
        prepare_stage(mixed(source, tmp_path / "out", tokenizer, mix, **more), progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("estimate", [True, False])
def test_too_little_of_a_window_is_refused_with_what_is_missing(source, tokenizer, tmp_path, estimate):
    plan = mixed(source, tmp_path / "out", tokenizer, sequences=4000, estimate=estimate)
    words = r"\*, 0 to 199 tokens, for sequences of 16: 51,200 wanted, [\d,]+ there, [\d,]+ missing"
    with pytest.raises(DataError, match=words):
        prepare_stage(plan, progress=False)
    assert (tmp_path / "tokenized").exists() == (not estimate)
    assert not (tmp_path / "out").exists()


def test_the_recipe_for_mixed_windows_is_scaled_as_the_stage_is():
    plan = job_of([*EXAMPLE[:2], "data=mixed", *EXAMPLE[3:]])
    assert [band.window for band in plan.settings.mix] == [None, 32]
    assert plan.batch * sum(plan.steps.values()) == plan.sequences
    full = job_of(["+stage=1048k", "data=mixed", *EXAMPLE[3:]])
    assert (full.settings.mix[1].window, full.steps) == (8192, {None: 46, 8192: 4})
    with pytest.raises(ConfigError, match=r"data.mix\[0\].window=100: scale.window=256 does not divide it"):
        job_of([*EXAMPLE, "data.mix=[{window: 100, share: 1.0}]"])
