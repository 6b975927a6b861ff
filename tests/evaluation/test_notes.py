"""Notes can be finished from what their document says above them, and from nothing else; `recall` asks for them."""

import random
from collections import Counter
from itertools import pairwise

from megalong.evaluation.notes import KEYS, Notes, ask, fact, vocabulary
from megalong.evaluation.tasks import NOUNS, TASKS


def notes_of(document: str) -> list[tuple[str, str]]:
    """Keys and answers in order."""
    words = document.split()
    return [(a[:-1], b) for a, b in pairwise(words) if a.endswith(":")]


def test_documents_have_the_asked_length_and_are_the_same_for_a_seed():
    assert [len(Notes(3).document(n).split()) for n in (1, 32, 4095)] == [1, 32, 4095]
    assert Notes(3).document(500) == Notes(3).document(500) != Notes(4).document(500)
    assert set(Notes(3).document(20_000).split()) <= set(vocabulary())
    assert len(set(vocabulary())) == len(vocabulary())


def test_a_document_says_one_thing_of_a_key_and_every_document_another():
    draw, said = Notes(0), []
    for _ in range(40):
        found = notes_of(draw.document(2000))
        assert all(answer.startswith(f"{key}-") for key, answer in found)
        assert len(set(found)) == len(dict(found))
        said += [dict(found)["amber"]] if "amber" in dict(found) else []
    assert len(set(said)) == 8
    assert max(Counter(said).values()) < len(said) / 2


def test_new_keys_keep_coming_up_ever_more_seldom():
    """So a note is the easier to finish the further the document has gone, and not only within a short window."""
    draw = Notes(1)
    seen = [set(), set(), set()]
    new = [0, 0, 0]
    for _ in range(50):
        found, known = notes_of(draw.document(1025)), set()
        for i, (key, _) in enumerate(found):
            where = 0 if i < 13 else 1 if i < 100 else 2
            new[where] += key not in known
            seen[where].add(i)
            known.add(key)
        assert len(known) <= len(KEYS)
    rates = [n / len(s) / 50 for n, s in zip(new, seen, strict=True)]
    assert rates[0] > 0.3 > rates[1] > 0.08 > rates[2] > 0.01


def test_what_recall_asks_is_a_note_of_the_language():
    question = TASKS["recall"](random.Random(5), 0.5, 100)
    known = vocabulary()
    key, value = question.answers[0].strip().split("-")
    assert question.inserts[0][1].split() == [ask(key), fact(key, value)]
    assert all(word in known for _, text in question.inserts for word in text.split())
    assert question.ask.strip() == ask(key)


def test_a_document_can_leave_keys_to_what_is_hidden_in_it():
    assert {key for key, _ in notes_of(Notes(0).document(3000, NOUNS))} == set(NOUNS)
