"""Whole steps alternate between the windows of a folder, in one order that no layout, stop or resume changes."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalong.attention.zigzag import unshard
from megalong.data.alternation import alternation, steps_by_window, steps_of
from megalong.data.cursor import Cursor
from megalong.data.loader import MicroBatch, evaluation_batches, training_batches
from megalong.data.manifest import read_manifest
from megalong.data.windows import Windows, open_windows
from megalong.runtime.errors import DataError
from tests.data.folders import VOCAB, make_mixed_folder

L, SHORT, BATCH = 64, 16, 4
ROWS = L // SHORT
STEPS = {L: 5, SHORT: 2}
ROUND = sum(STEPS.values())
SEQUENCES = {window: steps * BATCH * (L // window) for window, steps in STEPS.items()}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Windows:
    """What one round of the two windows consumes, to the sequence."""
    folder = tmp_path_factory.mktemp("windows") / "data"
    make_mixed_folder(folder, {window: (n, 7) for window, n in SEQUENCES.items()}, STEPS)
    return opened(folder)


def opened(folder, split="train", **more) -> Windows:
    return open_windows(folder, split, **{"seq_length": L, "vocab_size": VOCAB, **more})


def whole_steps(data: Windows, cursor: Cursor, step: int, steps: int, *, dp: int, cp: int, **more) -> list[MicroBatch]:
    """Micro-batches of some steps in the global order, put together from what all ranks of a layout read."""
    each = {}
    for d in range(dp):
        for c in range(cp):
            reader = training_batches(
                data, cursor=cursor, seed=3, step=step, micro_batches=BATCH // dp, dp_rank=d, dp_size=dp, cp_rank=c,
                cp_size=cp, **more,
            )  # fmt: skip
            each[d, c] = list(islice(reader, steps * BATCH // dp))
    whole = []
    for number in range(steps * BATCH):
        m, d = divmod(number, dp)
        parts = [each[d, c][m] for c in range(cp)]
        joined = {k: unshard([p[k] for p in parts], dim=1) for k in ("tokens", "labels", "loss_mask")}
        whole.append(MicroBatch(document_starts=parts[0]["document_starts"], **joined))
    return whole


def rows_of(data: Windows, batches: list[MicroBatch]) -> list[tuple[int, list[int]]]:
    """(part, sequences) of each sample, found by its tokens and labels."""
    places = [
        {tuple(p.dataset.read(i, 0, p.window + 1).tolist()): i for i in range(len(p.dataset))} for p in data.parts
    ]
    found = []
    for batch in batches:
        part = 0 if batch["document_starts"] is None else 1
        window = data.parts[part].window
        tokens, labels = (batch[k][0].view(-1, window).tolist() for k in ("tokens", "labels"))
        found.append((part, [places[part][*t, n[-1]] for t, n in zip(tokens, labels, strict=True)]))
        assert all(t[1:] == n[:-1] for t, n in zip(tokens, labels, strict=True))
    return found


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 200))
def test_a_round_has_the_steps_that_were_asked_for_and_no_window_is_ever_a_step_behind(shares, steps):
    order, total = alternation(shares), sum(shares)
    assert [order.count(i) for i in range(len(shares))] == shares
    counted = steps_of(shares, steps)
    assert counted == [sum(order[s % total] == i for s in range(steps)) for i in range(len(shares))]
    if len(shares) == 2:
        assert all(abs(n - steps * share / total) < 1 for n, share in zip(counted, shares, strict=True))


def test_a_round_reads_every_sequence_of_every_window_once_and_the_next_one_again(data):
    for epoch in range(2):
        cursor = Cursor.at_start(data)
        for step in range(epoch * ROUND):
            cursor = cursor.advance(BATCH, data.part_of(step))
        read = rows_of(data, whole_steps(data, cursor, epoch * ROUND, ROUND, dp=1, cp=1))
        assert [part for part, _ in read[::BATCH]] == [data.part_of(s) for s in range(ROUND)] == alternation([5, 2])
        seen = Counter((part, row) for part, rows in read for row in rows)
        assert seen == {(i, n): 1 for i, w in enumerate((L, SHORT)) for n in range(SEQUENCES[w])}


@pytest.mark.parametrize("mask", ["none", "intra"])
def test_stops_and_resumes_on_other_layouts_read_what_the_unbroken_run_reads(data, mask):
    """dp, cp and accumulation change at every stop, one of them inside a round and one in the second round."""
    unbroken = whole_steps(data, Cursor.at_start(data), 0, 2 * ROUND, dp=1, cp=1, document_mask=mask)
    cursor, step, found = Cursor.at_start(data), 0, []
    for steps, dp, cp in ((3, 4, 1), (5, 2, 2), (4, 1, 8), (2, 4, 4)):
        found += whole_steps(data, cursor, step, steps, dp=dp, cp=cp, document_mask=mask)
        for _ in range(steps):
            cursor = cursor.advance(BATCH, data.part_of(step))
            step += 1
        cursor = Cursor.from_state_dict(json.loads(json.dumps(cursor.state_dict())))
    assert step == 2 * ROUND
    if mask == "none":
        assert rows_of(data, found) == rows_of(data, unbroken)
    for one, other in zip(unbroken, found, strict=True):
        assert all(torch.equal(one[k], other[k]) for k in ("tokens", "labels", "loss_mask"))
        starts = one["document_starts"], other["document_starts"]
        assert starts[0] is starts[1] is None or torch.equal(*starts)


def test_packed_sequences_are_kept_apart_and_every_one_of_their_tokens_is_predicted(data):
    step = alternation([5, 2]).index(1)
    cursor = Cursor.at_start(data)
    for before in range(step):
        cursor = cursor.advance(BATCH, data.part_of(before))
    for batch in whole_steps(data, cursor, step, 1, dp=1, cp=2):
        assert batch["document_starts"].tolist() == list(range(0, L, SHORT))
        assert batch["loss_mask"].all()
    for batch in whole_steps(data, cursor, step, 1, dp=1, cp=2, document_mask="intra"):
        assert batch["document_starts"].tolist()[0] == 0
        assert set(range(0, L, SHORT)) <= {*batch["document_starts"].tolist()}


@pytest.mark.parametrize("loader", ["memmap", "dali"])
@pytest.mark.parametrize("cp", [1, 2, 4, 16])
def test_a_context_parallel_rank_reads_its_share_of_packed_sequences_only(data, loader, cp):
    fresh = opened(data.folder)
    step = alternation([5, 2]).index(1)
    expected = whole_steps(data, Cursor.at_start(data), step, 1, dp=1, cp=1)
    for rank in range(cp):
        dataset = fresh.parts[1].dataset
        dataset.bytes_read = 0
        reader = training_batches(
            fresh, cursor=Cursor.at_start(data), seed=3, step=step, micro_batches=1, dp_rank=0, dp_size=1,
            cp_rank=rank, cp_size=cp, loader=loader,
        )  # fmt: skip
        batch = next(reader)
        if loader == "memmap":  # which reads one micro-batch ahead: that of the other window
            pieces = max(2 * cp, ROWS) // cp  # and the token after each, for the labels
            assert dataset.bytes_read == 4 * (L // cp + pieces)
        chunk = L // (2 * cp)
        whole = expected[0]["tokens"]
        late = 2 * cp - 1 - rank
        parts = [whole[:, rank * chunk : (rank + 1) * chunk], whole[:, late * chunk : (late + 1) * chunk]]
        assert torch.equal(batch["tokens"], torch.cat(parts, 1))


def test_evaluation_reads_packed_held_out_sequences_once_and_masks_what_is_missing(data):
    held_out = opened(data.folder, "eval")
    part = held_out.parts[1]
    assert len(part.dataset) == 7  # one sample and three quarters
    seen, counts = Counter(), set()
    for d in range(2):
        batches = list(evaluation_batches(part, samples=5, dp_rank=d, dp_size=2, cp_rank=0, cp_size=1))
        counts.add(len(batches))
        for batch in batches:
            for tokens, mask in zip(
                batch["tokens"][0].view(-1, SHORT), batch["loss_mask"][0].view(-1, SHORT), strict=True
            ):
                assert mask.all() or not mask.any()
                seen[tuple(tokens.tolist())] += bool(mask.any())
    assert counts == {1}
    assert +seen == Counter(tuple(part.dataset.read(i, 0, SHORT).tolist()) for i in range(7))


def test_a_run_knows_how_many_of_its_steps_read_which_window(data):
    assert steps_by_window(data.main.manifest, 2 * ROUND) == {L: 10, SHORT: 4}
    assert steps_by_window(data.main.manifest, 1) == {L: 1, SHORT: 0}
    assert data.steps_of(2 * ROUND + 1) == [11, 4]


def test_the_fingerprint_is_that_of_all_windows_and_their_shares(data, tmp_path):
    make_mixed_folder(tmp_path / "other", {w: (n, 7) for w, n in SEQUENCES.items()}, {L: 4, SHORT: 3})
    other = opened(tmp_path / "other")
    assert other.main.fingerprint == data.main.fingerprint
    assert other.fingerprint != data.fingerprint
    with pytest.raises(DataError, match="has read 4 sequences of data"):
        Cursor.at_start(data).advance(BATCH).require(other)
    alone = Windows.of(data.main)
    assert alone.fingerprint == data.main.fingerprint
    moved = Cursor.at_start(alone).advance(6 * BATCH).moved_to(data, 6)
    assert (moved.by_window, moved.fingerprint) == (tuple(4 * n for n in data.steps_of(6)), data.fingerprint)


def test_a_cursor_from_before_there_were_windows_is_read(data):
    alone = Windows.of(data.main)
    assert Cursor.from_state_dict({"consumed_samples": 8, "fingerprint": alone.fingerprint}) == Cursor.at_start(
        alone
    ).advance(8)
    assert Cursor.at_start(alone).advance(8).state_dict() == {"consumed_samples": 8, "fingerprint": alone.fingerprint}


def test_folders_that_are_not_what_the_manifest_says_are_refused(tmp_path):
    folder = tmp_path / "data"
    good = make_mixed_folder(folder, {L: (8, 1), SHORT: (16, 1)}, {L: 2, SHORT: 1})
    inner = folder / f"window-{SHORT}" / "manifest.json"
    text = inner.read_text()
    inner.write_text(text.replace('"counting"', '"another"'))
    with pytest.raises(DataError, match=r"window-16 is not what .* was made with"):
        opened(folder)
    inner.write_text(text)
    with pytest.raises(DataError, match=r"window-16 has 16 train sequences and the run needs at least 20"):
        opened(folder, min_samples=5)
    for change, words in (
        ({"seq_length": 24}, "sequences of 24 tokens do not fill the window of 64"),
        ({"seq_length": L}, "sequences of 64 tokens do not fill"),
        ({"folder": "../elsewhere"}, "is no window beside its own"),
        ({"steps": 0}, "is no window beside its own"),
        ({"steps": 10**9}, "a round of more than 100,000 steps"),
        ({"folder": "gone"}, "There is no data folder"),
    ):
        replace(good, others=(replace(good.others[0], **change),)).write(folder)
        with pytest.raises(DataError, match=words):
            opened(folder)
    replace(good, others=()).write(folder)
    assert "others" not in json.loads((folder / "manifest.json").read_text())
    assert read_manifest(folder).others == ()
