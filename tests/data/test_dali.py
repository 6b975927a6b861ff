"""DALI is an option that reads the same tokens, and its absence is said with the name of the extra."""

from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest

from megalong.attention.zigzag import chunk_ranges
from megalong.data import dali
from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import read_memmap, training_batches
from megalong.runtime.errors import ConfigError
from tests.data.folders import make_folder


def _installed() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(_installed(), reason="DALI is installed")
def test_without_dali_the_extra_is_named_before_anything_is_read(tmp_path):
    make_folder(tmp_path / "data", [50, 60], 16)
    dataset = SequenceDataset(tmp_path / "data")
    where = {"seed": 1, "dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1}
    with pytest.raises(ConfigError, match=r"megalong\[dali\]"):
        training_batches(dataset, cursor=Cursor.at_start(dataset), loader="dali", **where)


@pytest.mark.skipif(not _installed(), reason="DALI (extra `dali`) is not installed")
def test_dali_and_memmap_read_the_same_tokens_across_files_and_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(dali, "BLOCK", 5)
    make_folder(tmp_path / "data", [500, 60, 70], 16, file_elements=17 * 4)
    dataset = SequenceDataset(tmp_path / "data")
    order = np.random.default_rng(0).integers(len(dataset), size=33).tolist()
    for cp_rank in range(2):
        ranges = chunk_ranges(16, 2, cp_rank)
        both = zip(dali.read_dali(dataset, order, ranges), read_memmap(dataset, order, ranges), strict=True)
        assert all(np.array_equal(a, b) for pair in both for a, b in zip(*pair, strict=True))
    batches = training_batches(
        dataset,
        cursor=Cursor.at_start(dataset),
        seed=1,
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        cp_size=2,
        document_mask="intra",
        loader="dali",
    )
    assert [tuple(b["tokens"].shape) for b in islice(batches, 12)] == [(1, 8)] * 12
