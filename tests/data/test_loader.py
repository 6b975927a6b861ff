"""What the ranks read together is the data, in an order that no layout, stop or resume changes."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.zigzag import unshard
from megalong.data.cursor import Cursor
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import MicroBatch, evaluation_batches, training_batches
from megalong.data.order import epoch_order
from megalong.data.windows import Part, Windows
from megalong.runtime.errors import ConfigError, DataError
from tests.data.folders import make_folder

L = 48
LENGTHS = [100, 7, 48, 49, 50, 3, 130, 1, 2, 30, 61, 5, 5, 5]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    folder: Path = tmp_path_factory.mktemp("loader") / "data"
    make_folder(folder, LENGTHS, L, held_out=[200], file_elements=4 * (L + 1))
    return SequenceDataset(folder)


def step(dataset, cursor, *, batch, cp, dp, mask="none") -> list[MicroBatch]:
    """One global batch in the global order, put together from what all ranks of a layout read."""
    by_dp = []
    for d in range(dp):
        shards = []
        for c in range(cp):
            reader = training_batches(
                Windows.of(dataset),
                cursor=cursor,
                seed=7,
                dp_rank=d,
                dp_size=dp,
                cp_rank=c,
                cp_size=cp,
                document_mask=mask,
            )
            shards.append(list(islice(reader, batch // dp)))
        by_dp.append(shards)
    whole = []
    for m in range(batch // dp):
        for d in range(dp):
            parts = [by_dp[d][c][m] for c in range(cp)]
            joined = {k: unshard([p[k] for p in parts], dim=1) for k in ("tokens", "labels", "loss_mask")}
            whole.append(MicroBatch(document_starts=parts[0]["document_starts"], **joined))
    return whole


def same(a: MicroBatch, b: MicroBatch) -> bool:
    starts = a["document_starts"], b["document_starts"]
    return all(torch.equal(a[k], b[k]) for k in ("tokens", "labels", "loss_mask")) and (
        starts[0] is starts[1] is None or torch.equal(*starts)
    )


@settings(max_examples=25, deadline=None)
@given(
    cp=st.sampled_from([1, 2, 3, 4, 8]),
    dp=st.sampled_from([1, 2, 3, 6]),
    consumed=st.integers(0, 40),
    mask=st.sampled_from(["none", "intra"]),
)
def test_all_ranks_together_read_the_same_batch_in_the_same_order_in_every_layout(dataset, cp, dp, consumed, mask):
    cursor = Cursor.at_start(Windows.of(dataset)).advance(consumed)
    alone = step(dataset, cursor, batch=6, cp=1, dp=1, mask=mask)
    shared = step(dataset, cursor, batch=6, cp=cp, dp=dp, mask=mask)
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_an_epoch_visits_every_sequence_once_and_its_labels_are_the_next_tokens(dataset):
    n = len(dataset)
    batches = step(dataset, Cursor.at_start(Windows.of(dataset)), batch=n, cp=2, dp=1)
    rows = {tuple(dataset.read(i, 0, L + 1).tolist()) for i in range(n)}
    assert {(*b["tokens"][0].tolist(), int(b["labels"][0, -1])) for b in batches} == rows
    assert all(torch.equal(b["tokens"][0, 1:], b["labels"][0, :-1]) for b in batches)
    assert batches[0]["tokens"].dtype == batches[0]["labels"].dtype == torch.int64
    assert batches[0]["loss_mask"].dtype == torch.float32


def test_resuming_at_a_cursor_with_another_layout_continues_the_unbroken_order(dataset):
    start = Cursor.at_start(Windows.of(dataset))
    unbroken = step(dataset, start, batch=24, cp=1, dp=1)
    first = step(dataset, start, batch=8, cp=2, dp=4)
    saved = start.advance(8).state_dict()
    rest = step(dataset, Cursor.from_state_dict(saved), batch=16, cp=4, dp=2)
    assert all(same(a, b) for a, b in zip(unbroken, first + rest, strict=True))


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (1, 2, 2**63) for epoch in (0, 1)]
    assert len(set(orders)) == len(orders)
    assert all(sorted(o) == list(range(50)) for o in orders)
    # pinned: a run resumed under another numpy must find the same order
    assert epoch_order(1234, 0, 8).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]


def test_padding_and_document_boundaries_are_not_predicted(dataset):
    for plain, intra in zip(
        *(
            step(dataset, Cursor.at_start(Windows.of(dataset)), batch=len(dataset), cp=4, dp=1, mask=m)
            for m in ("none", "intra")
        ),
        strict=True,
    ):
        row = next(i for i in range(len(dataset)) if dataset.read(i, 0, L).tolist() == plain["tokens"][0].tolist())
        starts, valid = dataset.document_starts(row).tolist(), dataset.valid_length(row)
        assert plain["document_starts"] is None
        assert plain["loss_mask"][0].tolist() == [float(p + 1 < valid) for p in range(L)]
        assert intra["document_starts"].tolist() == [s for s in starts if s < L]
        assert intra["loss_mask"][0].tolist() == [float(p + 1 < valid and p + 1 not in starts) for p in range(L)]


def test_evaluation_gives_every_rank_equally_many_batches_and_every_sequence_once(dataset):
    seen = []
    counts = set()
    for d in range(4):
        batches = list(evaluation_batches(Part(dataset), samples=6, dp_rank=d, dp_size=4, cp_rank=0, cp_size=1))
        counts.add(len(batches))
        seen += [tuple(b["tokens"][0].tolist()) for b in batches if b["loss_mask"].any()]
    assert counts == {2}
    spread = [i * len(dataset) // 6 for i in range(6)]
    assert sorted(seen) == sorted(tuple(dataset.read(i, 0, L).tolist()) for i in spread)


def test_a_cursor_in_other_data_and_an_unknown_loader_are_refused(dataset):
    where = {"seed": 1, "dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1}
    with pytest.raises(DataError, match="has read 12 sequences of data elsewhere"):
        training_batches(Windows.of(dataset), cursor=Cursor(12, "elsewhere"), **where)
    with pytest.raises(ConfigError, match="choose memmap or dali"):
        training_batches(Windows.of(dataset), cursor=Cursor.at_start(Windows.of(dataset)), loader="tape", **where)


def test_an_error_while_reading_ahead_is_raised_at_the_batch_that_has_it(tmp_path):
    make_folder(tmp_path / "data", LENGTHS, L)
    dataset = SequenceDataset(tmp_path / "data")
    first = int(epoch_order(1, 0, len(dataset))[2])
    path, row = dataset.location(first)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4 * (L + 1) * (dataset.manifest.train[0].sequences - row))
        file.write(b"\xff\xff\xff\x7f")
    batches = training_batches(
        Windows.of(dataset),
        cursor=Cursor.at_start(Windows.of(dataset)),
        seed=1,
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        cp_size=1,
    )
    next(batches)
    next(batches)
    with pytest.raises(DataError, match="sequence"):
        next(batches)
