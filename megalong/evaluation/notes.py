"""A language in which context helps: what does a small model have to be trained on so that its window shows?

A document is a row of notes, `amber: amber-candle`, with a few plain sentences between them. A note is a key and what
the document says of it, which is the same whenever the key comes up again, and different in every document.
So a value can be known only from an earlier note. New keys keep coming up at a falling rate (Pitman and Yor 1997), as
words do in real text, so a note is the easier to finish the more of the document has been seen. Notes have the form
of the question `recall` (tasks.py), which is how a model's use of them is scored.

A small model learns to look notes up within a minute, because one step of attention is enough: the answer carries its
key. Real text takes the same ability and far more training.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megalong.evaluation.tasks import ADJECTIVES, NOUNS, RECALL, RECORD, VALUES

_WORDS = (
    "the of and to a in that it was his he with as had for on at her they from by not were which but all there when"
)
_WORDS += " one so out up into them then would like some could more little down over very upon time"
WORDS = _WORDS.split()
FOLLOWERS = 4
"""Words that may follow a word."""
END, UNKNOWN = "<|end_of_text|>", "<|unknown|>"
KEYS = ADJECTIVES + NOUNS
"""What notes are about: what `recall` asks for, and as many more."""
NOTES = 0.8
"""Share of notes; the rest are sentences."""
DISCOUNT, STRENGTH = 0.5, 1.5
"""Of the Pitman-Yor process that draws keys: after n notes a new one comes up in about n ** (DISCOUNT - 1)."""


class Notes:
    """Endless documents; the same seed draws the same.

    Args:
        seed: of the documents. The grammar is the language's own.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        grammar = random.Random(0)
        self._next = {word: grammar.choices(WORDS, k=FOLLOWERS) for word in WORDS}

    def document(self, tokens: int, keys: Sequence[str] = KEYS) -> str:
        """A text of exactly so many tokens by `vocabulary()`, with notes about some keys or all."""
        found: list[str] = []
        for piece in self._pieces(keys):
            found += piece
            if len(found) >= tokens:
                return " ".join(found[:tokens])
        raise AssertionError("a document does not end by itself")

    def _pieces(self, about: Sequence[str]) -> Iterator[list[str]]:
        draw = self._random
        keys, says = draw.sample(about, len(about)), {key: draw.choice(VALUES) for key in about}
        counts: list[float] = []  # of each key that came up, less the discount
        notes = 0
        while True:
            if draw.random() >= NOTES:
                yield self._sentence()
                continue
            new = STRENGTH + DISCOUNT * len(counts) if len(counts) < len(keys) else 0.0
            if draw.random() * (notes + STRENGTH) < new:
                which = len(counts)
                counts.append(1.0 - DISCOUNT)
            else:
                which = draw.choices(range(len(counts)), cum_weights=list(accumulate(counts)))[0]
                counts[which] += 1.0
            notes += 1
            key = keys[which]
            yield [ask(key), fact(key, says[key])]

    def _sentence(self) -> list[str]:
        first = self._random.choice(WORDS)
        return [first, self._random.choice(self._next[first]), "."]


def ask(key: str) -> str:
    """The token that asks for what the document says of a key."""
    return RECALL.format(key=key).strip()


def fact(key: str, value: str) -> str:
    """The token that answers."""
    return RECORD.format(key=key, value=value).split()[-1]


def vocabulary() -> list[str]:
    """Every token of the language."""
    return [".", *WORDS, *map(ask, KEYS), *(fact(key, value) for key in KEYS for value in VALUES)]


def write_tokenizer(folder: Path) -> None:
    """The tokenizer of the language: a token is a word, a key with its colon, or an answer."""
    folder.mkdir()
    ids = {word: i for i, word in enumerate([END, UNKNOWN, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\w-]+:?|\S"), "removed", invert=True)
    tokenizer.add_special_tokens([END, UNKNOWN])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END, "eos_token": END, "unk_token": UNKNOWN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
