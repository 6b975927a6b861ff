"""From shards to a data folder: every document once, shares and budget to the token, the same bytes always."""

import os
import random
import shutil
import signal
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megalong.data.builder import held_out
from megalong.data.dataset import SequenceDataset
from megalong.data.pipeline.pool import run_all
from megalong.data.pipeline.quotas import apportion
from megalong.data.pipeline.run import prepare_stage
from megalong.data.pipeline.settings import Band, Recall
from megalong.runtime.errors import DataError
from tests.data import corpus
from tests.data.corpus import SOURCES, WINDOW, digests, documents_in, job, stream

EOS = 0


@pytest.fixture(scope="module")
def of() -> list[str]:
    return corpus.texts()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, of) -> Path:
    return corpus.make_tokenizer(tmp_path_factory.mktemp("tokenizer"), of)


@pytest.fixture(scope="module")
def source(tmp_path_factory, of) -> Path:
    return corpus.make_shards(tmp_path_factory.mktemp("source") / "slimpajama", corpus.records(of))


def encoded(tokenizer: Path, texts: list[str]) -> list[list[int]]:
    plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return [plain.encode(t, add_special_tokens=False).ids for t in texts]


def test_every_kept_document_is_there_once_and_in_order(tmp_path, of, tokenizer):
    doubled = [*corpus.records(of), *corpus.records(of[:9]), corpus.record("  \n", "RedPajamaC4")]
    source = corpus.make_shards(tmp_path / "source", doubled)
    manifest = prepare_stage(job(source, tmp_path / "out", tokenizer, budget="all", order="given"), progress=False)
    names = [r["meta"]["redpajama_set_name"] for r in corpus.records(of)]
    for split, is_held in (("train", False), ("eval", True)):
        ordered = [
            t for s in SOURCES for t, name in zip(of, names, strict=True) if name == s and held_out(t, 0.1) == is_held
        ]
        if split == "train":
            expected = [[*ids, EOS] for ids in encoded(tokenizer, ordered)]
            assert documents_in(tmp_path / "out", split) == expected
        else:
            assert len(documents_in(tmp_path / "out", split)) <= len(ordered)
    assert manifest.made["documents"]["dropped"] == {"copies": 9, "empty": 1, "short": 0}
    assert manifest.made["documents"]["read"] == len(of) + 10
    assert manifest.dtype == "<u4"


@pytest.mark.parametrize("separator", ["eos", "eos_bos", "none"])
def test_separators_stand_between_documents_and_boundaries_are_recorded_without_them(
    tmp_path, of, tokenizer, source, separator
):
    prepare_stage(
        job(source, tmp_path / "out", tokenizer, budget="all", order="given", separator=separator), progress=False
    )
    before, after = {"eos": ([], [EOS]), "eos_bos": ([EOS], [EOS]), "none": ([], [])}[separator]
    kept = [t for t in of if not held_out(t, 0.1)]
    expected = {(*before, *ids, *after) for ids in encoded(tokenizer, kept)}
    assert {tuple(ids) for ids in documents_in(tmp_path / "out")} == expected


def test_budget_and_shares_are_met_to_the_token(tmp_path, tokenizer, source):
    shares = {"RedPajamaBook": 0.2, "RedPajamaC4": 0.5, "RedPajamaGithub": 0.3}
    manifest = prepare_stage(
        job(source, tmp_path / "out", tokenizer, sequences=77, shares=shares, long_from=300, long_share=0.6),
        progress=False,
    )
    total = 77 * WINDOW
    wanted = dict(zip(SOURCES, apportion(total, list(shares.values())), strict=True))
    assert manifest.sequences("train") == 77
    assert manifest.made["tokens"] == wanted
    assert sum(wanted.values()) == total == len(stream(tmp_path / "out")[0])
    for part in manifest.made["parts"]:
        name, _, lengths = part["part"].partition(", ")
        share = 0.6 if lengths.endswith("and more tokens") else 0.4
        assert abs(part["tokens"] - share * wanted[name]) < 1, part


def test_without_shares_the_mix_of_sources_is_that_of_the_documents(tmp_path, tokenizer, source):
    every = prepare_stage(job(source, tmp_path / "all", tokenizer, budget="all"), progress=False).made["tokens"]
    some = prepare_stage(
        job(source, tmp_path / "some", tokenizer, sequences=50, long_from=300, long_share=0.5), progress=False
    ).made["tokens"]
    for name in SOURCES:
        assert abs(some[name] - 50 * WINDOW * every[name] / sum(every.values())) < 1


def test_only_lengths_asked_for_are_chosen_and_whole_windows_are_one_document(tmp_path, tokenizer, source):
    mix = [
        {"source": "RedPajamaBook", "min_tokens": 300, "share": 0.5, "whole_windows": True},
        {"source": "*", "max_tokens": 300, "share": 0.5},
    ]
    made = prepare_stage(
        job(source, tmp_path / "out", tokenizer, sequences=40, mix=[Band(**b) for b in mix]), progress=False
    ).made
    assert [p["tokens"] for p in made["parts"]] == [20 * WINDOW, 20 * WINDOW]
    _, starts = stream(tmp_path / "out")
    assert all(s % WINDOW == 0 for s in starts if s < 20 * WINDOW)
    assert any(s % WINDOW for s in starts if s > 20 * WINDOW)


def test_documents_of_a_repository_become_one(tmp_path, of, tokenizer, source):
    prepare_stage(
        job(source, tmp_path / "out", tokenizer, budget="all", order="given", join_key="meta.repo", join_text=""),
        progress=False,
    )
    found = documents_in(tmp_path / "out")
    groups: dict[tuple[str, str], list[str]] = {}
    for document in corpus.records(of):
        if not held_out(document["text"], 0.1):
            meta = document["meta"]
            groups.setdefault((meta["redpajama_set_name"], meta["repo"]), []).append(document["text"])
    expected = {(*chain(*encoded(tokenizer, parts)), EOS) for parts in groups.values()}
    assert {tuple(ids) for ids in found} == expected
    assert len(found) == len(expected)


def test_facts_stand_early_questions_at_the_end_and_everything_else_is_used_once(tmp_path, tokenizer, source):
    plan = job(
        source, tmp_path / "out", tokenizer, sequences=12, recall=Recall(share=0.25, facts=3, early=0.5), order="given"
    )
    plan = type(plan)(**{**plan.__dict__, "seq_length": 1024})
    made = prepare_stage(plan, progress=False).made
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    dataset = SequenceDataset(tmp_path / "out")
    rows = [decode(dataset.read(i, 0, 1024).tolist()) for i in range(12)]
    with_facts = [(i, row) for i, row in enumerate(rows) if "Question: What is the code" in row]
    assert [i for i, _ in with_facts] == [2, 6, 10]
    for i, row in with_facts:
        assert dataset.document_starts(i).tolist() in ([0], [0, 1024])
        asked = row.index("Question:")
        told = {line for line in row[:asked].splitlines() if line.startswith("The code of the ")}
        assert len(told) == 3
        assert all(line.rstrip(".") in row[asked:] for line in told)
        assert row[asked:].count("Answer:") == 3
        assert row.index("The code of") < 0.55 * asked
    assert sum(made["tokens"].values()) == 12 * 1024
    assert made["tokens"]["recall"] > 0


def test_special_tokens_inside_a_text_stay_text(tmp_path, of, tokenizer):
    said = f"before<|end_of_text|>after {of[3]}"
    source = corpus.make_shards(tmp_path / "source", corpus.records([*of, said]), 1)
    prepare_stage(job(source, tmp_path / "out", tokenizer, budget="all", eval_fraction=0.02), progress=False)
    found = [ids for ids in documents_in(tmp_path / "out") if EOS in ids[:-1]]
    assert found == []
    decode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).decode
    assert any(decode(ids[:-1]) == said for ids in documents_in(tmp_path / "out"))


def test_another_seed_chooses_otherwise_and_another_cut_of_shards_does_not(tmp_path, of, tokenizer, source):
    one = job(source, tmp_path / "one", tokenizer, sequences=30)
    prepare_stage(one, progress=False)
    other = job(source, tmp_path / "other", tokenizer, sequences=30)
    prepare_stage(type(other)(**{**other.__dict__, "seed": 8}), progress=False)
    cut = corpus.make_shards(tmp_path / "cut", corpus.records(of), 2)
    prepare_stage(job(cut, tmp_path / "again", tokenizer, sequences=30), progress=False)
    assert not np.array_equal(stream(tmp_path / "one")[0], stream(tmp_path / "other")[0])
    assert np.array_equal(stream(tmp_path / "one")[0], stream(tmp_path / "again")[0])


def test_one_two_and_four_workers_write_the_same_bytes(tmp_path, tokenizer, source):
    found = []
    for workers in (1, 2, 4):
        here = tmp_path / str(workers)
        plan = job(source, here / "out", tokenizer, workers=workers, long_from=300, long_share=0.5)
        prepare_stage(plan, progress=False, file_elements=30 * (WINDOW + 1))
        tokenized = sorted(p.relative_to(here).as_posix() for p in (here / "tokenized").rglob("*"))
        found.append((digests(here / "out"), tokenized, [digests(p) for p in sorted((here / "tokenized").iterdir())]))
    assert len(found[0][0]) >= 9  # several files, written by different processes
    assert found[0] == found[1] == found[2]


def test_killed_at_ten_random_points_and_begun_again_it_is_as_if_unbroken(tmp_path, tokenizer, source, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    plan = job(source, tmp_path / "whole" / "out", tokenizer)
    began = time.monotonic()
    prepare_stage(plan, progress=False)
    seconds = time.monotonic() - began
    chance = random.Random(3)
    broken = job(source, tmp_path / "broken" / "out", tokenizer)
    killed = 0
    for attempt in range(10):
        if attempt % 3 == 0:  # not only ever the last step
            shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        child = os.fork()
        if not child:
            code = 1
            try:
                prepare_stage(broken, progress=False)
                code = 0
            finally:
                os._exit(code)
        time.sleep(chance.uniform(0.02, 0.9) * seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        shutil.rmtree(tmp_path / "broken" / "out", ignore_errors=True)  # if it was quicker than the signal
    assert killed >= 5
    prepare_stage(broken, progress=False)
    assert digests(tmp_path / "broken" / "out") == digests(tmp_path / "whole" / "out")
    assert not list((tmp_path / "broken").rglob("*.partial"))


def test_too_little_is_refused_before_tokenizing_with_what_is_missing_by_source(tmp_path, tokenizer, source):
    shares = {"RedPajamaBook": 0.9, "RedPajamaC4": 0.05, "RedPajamaGithub": 0.05}
    for more, words in (
        ({"sequences": 50000}, r"Too little data for the stage.*tokens"),
        ({"sequences": 2000, "shares": shares}, r"RedPajamaBook: 115,200 wanted, [\d,]+ there, [\d,]+ missing"),
    ):
        with pytest.raises(DataError, match=words):
            prepare_stage(job(source, tmp_path / "out", tokenizer, **more), progress=False)
    assert not (tmp_path / "tokenized").exists()
    with pytest.raises(DataError, match=r"RedPajamaBook: 115,200 wanted"):
        prepare_stage(
            job(source, tmp_path / "out", tokenizer, sequences=2000, shares=shares, estimate=False), progress=False
        )
    assert not (tmp_path / "out").exists()
    more = job(source, tmp_path / "out", tokenizer, sequences=2000, shares=shares, max_passes=9)
    assert prepare_stage(more, progress=False).sequences("train") == 2000


def _die(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_kills_is_named_and_nothing_hangs():
    with pytest.raises(DataError, match=r"A process was killed.*2 tasks were open, the first shard 1.*fewer workers"):
        run_all(_die, [1, 2], 2, describe=lambda task: f"shard {task}")
