"""Questions have exactly the length and the answer that they say, and what cannot be asked is said clearly."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.evaluation.checkpoint import find_checkpoint, layout_for
from megalong.evaluation.documents import (
    key_tokens,
    long_documents,
    loss_by_position,
    per_token_samples,
    position_samples,
    short_context_samples,
)
from megalong.evaluation.haystack import Haystack, read_haystack
from megalong.evaluation.sample import NOWHERE, Slot
from megalong.evaluation.suite import Grid, draw_tokens, make_suite, results
from megalong.evaluation.tasks import KEYS, RECALL, RECORD, TASKS, VALUES
from megalong.evaluation.tokens import PromptTokenizer
from megalong.runtime.errors import CheckpointError, ConfigError, DataError, LayoutError
from tests.evaluation.models import save_model

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("suite") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder) -> PromptTokenizer:
    return PromptTokenizer(folder)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1200, 3001])
def test_a_question_has_the_asked_length_and_hides_its_answer_in_the_text(tokenizer, task, length):
    haystack = read_haystack(None, tokenizer)
    drawn = draw_tokens(task, length, 0.5, random.Random(1), tokenizer, haystack)
    prompt = tokenizer.decode(drawn.prompt)
    assert len(drawn.prompt) + sum(map(len, drawn.answers)) == length
    for answer in drawn.answers:
        assert tokenizer.decode(answer).strip(" ,") in prompt
    again = draw_tokens(task, length, 0.5, random.Random(1), tokenizer, haystack)
    assert again == drawn


def test_the_needle_lies_at_its_depth(tokenizer):
    haystack = read_haystack(None, tokenizer)
    for depth in (0.0, 0.3, 1.0):
        drawn = draw_tokens("passkey", 2000, depth, random.Random(2), tokenizer, haystack)
        text = tokenizer.decode(drawn.prompt)
        at = len(tokenizer.encode(text[: text.index("The pass key is")])) / len(drawn.prompt)
        assert at == pytest.approx(depth, abs=0.12)


def test_recall_is_running_text_that_ends_where_a_record_is_begun_again(tokenizer, tmp_path):
    chat = save_model(tmp_path / "chat")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    drawn = [
        draw_tokens("recall", 128, 0.5, random.Random(3), t, read_haystack(None, t))
        for t in (tokenizer, PromptTokenizer(chat))
    ]
    assert drawn[0] == drawn[1]
    text, answer = (tokenizer.decode(ids) for ids in (drawn[0].prompt, drawn[0].answers[0]))
    key, value = answer.strip().split("-")
    assert text.endswith(RECALL.format(key=key))
    assert text.count(RECORD.format(key=key, value=value)) == 1
    assert sum(RECORD.format(key=k, value=v) in text for k in KEYS for v in VALUES) == 4
    assert len(drawn[0].prompt) + len(drawn[0].answers[0]) == 128


def test_values_of_one_key_are_asked_in_the_order_in_which_they_appear(tokenizer):
    for seed in range(5):
        question = TASKS["multi_value"](random.Random(seed), 0.9, 2000)
        text = tokenizer.decode(
            read_haystack(None, tokenizer).with_inserts(2000, [(d, tokenizer.encode(t)) for d, t in question.inserts])
        )
        places = [text.index(answer.strip(" ,")) for answer in question.answers]
        assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(
    sentences=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    pieces=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 5)), max_size=4),
    extra=st.integers(0, 60),
    start=st.integers(0, 7),
)
def test_inserted_pieces_stay_whole_and_the_length_is_exact(sentences, pieces, extra, start):
    haystack = Haystack([[0] * n for n in sentences], "test", True)
    inserts = [(d, [i + 1] * n) for i, (d, n) in enumerate(pieces)]
    total = extra + sum(n for _, n in pieces)
    found = haystack.with_inserts(total, inserts, start)
    assert len(found) == total
    for _, piece in inserts:
        assert piece[0] in found
        at = found.index(piece[0])
        assert found[at : at + len(piece)] == piece


def test_a_haystack_shorter_than_asked_is_refused_unless_it_may_be_repeated(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("A short text. It ends soon.")
    short = read_haystack(tmp_path, tokenizer)
    with pytest.raises(DataError, match=r"has \d+ tokens and [\d,]+ are asked for.*--repeat"):
        draw_tokens("needle", 1500, 0.5, random.Random(0), tokenizer, short)
    draw_tokens("needle", 1500, 0.5, random.Random(0), tokenizer, read_haystack(tmp_path, tokenizer, True))


def test_a_length_that_does_not_hold_the_question_is_refused_with_what_it_takes(tokenizer):
    haystack = read_haystack(None, tokenizer)
    with pytest.raises(DataError, match=r"A needle question takes \d+ tokens .* length 50 is too short"):
        make_suite(Grid(("needle",), (50,)), tokenizer, haystack)
    left_out: list[str] = []
    suite = make_suite(Grid(("needle",), (50, 600), (0.5,), 1), tokenizer, haystack, left_out)
    assert [c.length for c in suite.cells] == [600]
    assert left_out[0].startswith("needle at 50 tokens")


def test_an_answer_that_would_tokenize_across_its_edge_is_counted_and_scored_apart(tokenizer):
    # this tokenizer has a token for " th": "t" and "h" apart give other tokens than together
    before = tokenizer.crossed
    assert tokenizer.encode("x t") + tokenizer.encode("he") != tokenizer.encode("x the")
    parts = tokenizer.answers("x t", ["he"])
    assert parts == [tokenizer.encode("he")]
    assert tokenizer.crossed == before + 1
    tokenizer.answers("the key is", [" 12"])
    assert tokenizer.crossed == before + 1


def test_prompts_go_through_the_chat_template_where_there_is_one(folder, tmp_path):
    chat = save_model(tmp_path / "chat")
    config = json.loads((chat / "tokenizer_config.json").read_text())
    (chat / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    tokenizer = PromptTokenizer(chat)
    drawn = draw_tokens("passkey", 600, 0.5, random.Random(0), tokenizer, read_haystack(None, tokenizer))
    text = tokenizer.decode(drawn.prompt)
    assert text.startswith("<|user|>There is an important info")
    assert text.endswith("What is the pass key?<|end|><|a|>The pass key is")
    assert len(drawn.prompt) + len(drawn.answers[0]) == 600
    assert not PromptTokenizer(chat, chat=False).chat
    with pytest.raises(DataError, match="no chat template"):
        PromptTokenizer(folder, chat=True)


def test_what_is_not_there_is_said(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        find_checkpoint(tmp_path / "empty")
    with pytest.raises(DataError):
        read_haystack(tmp_path / "empty", tokenizer)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.md").write_text("x")
    with pytest.raises(CheckpointError, match=r"neither a Hugging Face directory.*notes\.md"):
        find_checkpoint(tmp_path / "other")
    with pytest.raises(DataError, match="has no tokenizer"):
        PromptTokenizer(tmp_path / "other")
    with pytest.raises(ConfigError, match="There is no task nedle: choose among needle"):
        Grid(("nedle",), (10,))
    with pytest.raises(ConfigError, match="depths"):
        Grid(("needle",), (10,), (1.5,))
    with pytest.raises(LayoutError, match="take 4 ranks, but 2 were started"):
        layout_for(2, 2, 2, 1)


def test_documents_shorter_than_the_window_are_named_with_their_length(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(DataError, match=r"none of 1 documents has 500 tokens \(the longest has \d+\)"):
        long_documents(tmp_path, tokenizer, 500, 1)


def test_a_share_of_the_answers_is_their_accuracy_and_all_of_them_is_exact(tokenizer):
    suite = make_suite(Grid(("multi_query",), (700,), (0.5,), 2), tokenizer, read_haystack(None, tokenizer))
    slots = [Slot(1.0, 3, 3, 0), Slot(2.0, 2, 3, 0), Slot(1.0, 3, 3, 0), Slot(0.0, 3, 3, 0)] + [Slot(0.0, 3, 3, 0)] * 4
    (cell,) = results(suite, slots)
    assert cell.accuracy == pytest.approx(7 / 8)
    assert cell.exact == 0.5
    assert cell.loss == pytest.approx(4 / 24)


def test_every_token_has_at_least_a_base_window_of_short_context_and_is_compared_once():
    documents = [torch.arange(101), torch.arange(101)]
    long, count = per_token_samples(documents)
    seen = torch.zeros(count, dtype=torch.int64)
    for sample in short_context_samples(documents, 10):
        assert (sample.slots[:10] == NOWHERE).all()
        own = sample.slots[sample.slots != NOWHERE]
        seen[own] += 1
        assert torch.equal(sample.tokens[sample.slots != NOWHERE], own % 101)
    assert seen.max() == 1
    assert seen.view(2, 101)[:, 20:].all()
    assert not seen.view(2, 101)[:, :20].any()
    assert long[1].slots[1] == 102


def test_key_tokens_are_those_that_far_context_makes_likely():
    long = [Slot(0.5, 1, 1, 0), Slot(1.9, 1, 1, 0), Slot(2.5, 1, 1, 0), Slot(0.1, 1, 1, 0), Slot(0, 0, 0, 0)]
    short = [Slot(3.0, 0, 1, 0), Slot(3.0, 0, 1, 0), Slot(9.0, 0, 1, 0), Slot(0, 0, 0, 0), Slot(9.0, 0, 1, 0)]
    assert key_tokens(long, short) == [0]


def test_positions_are_those_of_the_inputs():
    (sample,) = position_samples([torch.arange(9)], [0, 4, 8])
    assert sample.slots.tolist() == [NOWHERE, 0, 0, 0, 0, 1, 1, 1, 1]
    assert loss_by_position([Slot(4.0, 0, 4, 0), Slot(8.0, 0, 4, 0)], [0, 4, 8]).loss == [1.0, 2.0]
