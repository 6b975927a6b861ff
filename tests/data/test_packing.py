"""Packing loses nothing, repeats nothing, and keeps long texts in one piece."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.data.packing import Packer, Sequence
from tests.data.folders import EOS, counting_documents

lengths = st.lists(st.integers(1, 60), max_size=25)


def pack(documents: list[np.ndarray], seq_length: int) -> list[Sequence]:
    packer = Packer(seq_length, EOS)
    return [s for d in documents for s in packer.add(d)] + list(packer.finish())


@settings(max_examples=150, deadline=None)
@given(lengths=lengths, seq_length=st.integers(1, 24))
def test_every_token_after_the_first_of_a_document_is_predicted_once_from_its_predecessor(lengths, seq_length):
    # ids that are unique over all documents, so that a (token, next token) pair names one place in the text
    unique = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]) if lengths else []
    predicted = []
    for s in pack([u.astype(np.int32) for u in unique], seq_length):
        for i in range(seq_length):
            if i + 1 < s.valid_length and i + 1 not in s.starts:
                predicted.append((int(s.tokens[i]), int(s.tokens[i + 1])))
    wanted = [(int(a), int(b)) for u in unique for a, b in pairwise(u)]
    assert sorted(predicted) == sorted(wanted)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, seq_length=st.integers(1, 24))
def test_a_row_is_full_but_for_the_last_and_starts_are_ascending_from_zero(lengths, seq_length):
    rows = pack([d for _, d in counting_documents(lengths)], seq_length)
    assert all(r.tokens.shape == (seq_length + 1,) and r.tokens.dtype == np.int32 for r in rows)
    assert all(r.valid_length == seq_length + 1 for r in rows[:-1])
    for r in rows:
        assert r.starts[0] == 0
        assert r.starts == sorted(set(r.starts))
        assert r.starts[-1] < r.valid_length


def test_a_long_document_fills_sequences_alone_however_short_texts_surround_it():
    documents = [d for _, d in counting_documents([3, 33, 3])]
    rows = pack(documents, seq_length=8)
    alone = [r for r in rows if r.starts == [0] and r.valid_length == 9]
    assert len(alone) == 4
    joined = np.concatenate([alone[0].tokens, *(r.tokens[1:] for r in alone[1:])])
    assert joined.tolist() == documents[1].tolist()
