"""DALI reads the same tokens and nothing else, resumes in the same place, and its absence is said."""

import sys
from itertools import islice

import numpy as np
import pytest
import torch

from megalong.attention.zigzag import chunk_ranges
from megalong.data import dali
from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import fetcher, pieces_of, read_memmap, training_batches
from megalong.data.pipeline.run import prepare_stage
from megalong.data.windows import Windows
from megalong.runtime.errors import ConfigError
from tests.data import corpus
from tests.data.folders import make_folder


def test_without_dali_the_extra_is_named_before_anything_is_read(tmp_path, monkeypatch):
    make_folder(tmp_path / "data", [50, 60], 16)
    dataset = SequenceDataset(tmp_path / "data")
    data = Windows.of(dataset)
    where = {"seed": 1, "dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1}
    for name in [name for name in sys.modules if name == "nvidia" or name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "-packages" not in p])  # as on a machine without it
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ConfigError, match=r"data\.loader=dali needs NVIDIA DALI.*megalong\[dali\]"):
        training_batches(data, cursor=Cursor.at_start(data), loader="dali", **where)


def test_dali_and_memmap_read_the_same_tokens_across_files_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(dali, "BLOCK", 5)
    make_folder(tmp_path / "data", [500, 60, 70], 16, file_elements=17 * 4)
    dataset = SequenceDataset(tmp_path / "data")
    order = np.random.default_rng(0).integers(len(dataset), size=33).tolist()
    for cp_rank in range(2):
        ranges = chunk_ranges(16, 2, cp_rank)
        pieces = [pieces_of([sequence], 16, ranges) for sequence in order]
        both = zip(dali.read_dali(dataset, pieces), read_memmap(dataset, pieces), strict=True)
        assert all(np.array_equal(a, b) for pair in both for a, b in zip(*pair, strict=True))
    batches = training_batches(
        Windows.of(dataset),
        cursor=Cursor.at_start(Windows.of(dataset)),
        seed=1,
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        cp_size=2,
        document_mask="intra",
        loader="dali",
    )
    assert [tuple(b["tokens"].shape) for b in islice(batches, 12)] == [(1, 8)] * 12


@pytest.fixture(scope="module")
def recipe_made(tmp_path_factory) -> SequenceDataset:
    """A folder of uint32 with several files."""
    home = tmp_path_factory.mktemp("dali")
    of = corpus.texts(60)
    tokenizer = corpus.make_tokenizer(home / "tokenizer", of)
    source = corpus.make_shards(home / "source", corpus.records(of), 2)
    plan = corpus.job(source, home / "out", tokenizer, sequences=50, eval_fraction=0.2)
    prepare_stage(plan, progress=False, file_elements=9 * (corpus.WINDOW + 1))
    return SequenceDataset(home / "out")


@pytest.mark.parametrize("mask", ["none", "intra"])
def test_both_loaders_give_identical_batches_from_any_cursor_on(recipe_made, mask):
    assert recipe_made.manifest.dtype == "<u4"
    for consumed, dp, cp in ((0, 1, 1), (8, 2, 2), (44, 2, 4)):  # the last goes on into the second epoch
        for d in range(dp):
            where = {"seed": 5, "dp_rank": d, "dp_size": dp, "cp_rank": cp - 1, "cp_size": cp, "document_mask": mask}
            data = Windows.of(recipe_made)
            cursor = Cursor.at_start(data).advance(consumed)
            one, two = (
                list(islice(training_batches(data, cursor=cursor, loader=loader, **where), 7))
                for loader in ("memmap", "dali")
            )
            for a, b in zip(one, two, strict=True):
                assert all(torch.equal(a[k], b[k]) for k in ("tokens", "labels", "loss_mask"))
                assert a["document_starts"] is b["document_starts"] is None or torch.equal(
                    a["document_starts"], b["document_starts"]
                )


@pytest.mark.parametrize("loader", ["memmap", "dali"])
def test_a_context_parallel_rank_reads_its_own_two_chunks_only(recipe_made, loader):
    bytes_of = {}
    for cp in (1, 2, 8):
        dataset = SequenceDataset(recipe_made.folder)
        for rank in range(cp):
            dataset.bytes_read = 0
            ranges = chunk_ranges(corpus.WINDOW, cp, rank)
            fetch = fetcher(loader)(dataset, [pieces_of([sequence], corpus.WINDOW, ranges) for sequence in (3, 41)])
            assert len(list(fetch)) == 2
            bytes_of[cp, rank] = dataset.bytes_read
    for (cp, _), count in bytes_of.items():  # and the token after each chunk, for the labels
        assert count == 2 * 4 * (corpus.WINDOW // cp + 2)
