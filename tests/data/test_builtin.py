"""Processes that start together build the built-in corpus once and share it; transformers loads its tokenizer."""

import json
from pathlib import Path

import pytest

from megalong.data.builtin import END_OF_TEXT, builtin_corpus, builtin_tokenizer
from megalong.data.dataset import SequenceDataset, open_dataset

VOCAB = 512


def _build(cache: str, seq_length: int) -> tuple[str, str, int]:
    folder = builtin_corpus(Path(cache), seq_length, VOCAB)
    dataset = open_dataset(folder, "train", seq_length=seq_length, vocab_size=VOCAB, verify=True)
    return str(folder), dataset.fingerprint, (folder / "manifest.json").stat().st_mtime_ns


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_ranks_that_start_together_get_one_corpus_built_once(ranks, cache):
    answers = ranks.run(_build, 4, str(cache), 1024)
    assert len(set(answers)) == 1
    assert not list(cache.rglob("*.partial"))


def test_most_of_a_long_window_is_one_document_and_the_splits_share_no_text(cache):
    folder = builtin_corpus(cache, 4096, VOCAB)
    train, held_out = SequenceDataset(folder, "train"), SequenceDataset(folder, "eval")
    assert len(train) >= 100
    assert len(held_out) >= 16
    alone = sum(len(train.document_starts(i)) == 1 for i in range(len(train)))
    assert alone > 0.7 * len(train)
    rows = {train.read(i, 0, 4097).tobytes() for i in range(len(train))}
    assert not any(held_out.read(i, 0, 4097).tobytes() in rows for i in range(len(held_out)))


def test_transformers_loads_the_tokenizer_and_text_survives_it(cache):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin_tokenizer(cache, VOCAB))
    text = "def f(x: float) -> float:\n\treturn x**2  # naïve ∑\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == END_OF_TEXT
    manifest = json.loads((builtin_corpus(cache, 1024, VOCAB) / "manifest.json").read_text())
    assert manifest["tokenizer"]["eos_token_id"] == tokenizer.eos_token_id
    assert manifest["tokenizer"]["vocab_size"] == len(tokenizer) == VOCAB
