"""The text that needles are hidden in: the user's, or a few pages in the public domain that come with megalong.

Text is cut into sentences, and each is tokenized by itself, so that needles can stand between any two of them without
changing a token around them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalong.data.texts import texts_of
from megalong.evaluation.tokens import PromptTokenizer
from megalong.runtime.errors import DataError

BUILTIN = Path(__file__).with_name("texts") / "haystack.txt"
"""Openings of works in the public domain: Lincoln (1863), Carroll (1865), the Declaration of Independence (1776),
Melville (1851), Austen (1813), Dickens (1859), Doyle (1891)."""


@dataclass(frozen=True)
class Haystack:
    """Sentences and their tokens."""

    sentences: list[list[int]]
    """Token ids of each, with the space before it."""
    source: str
    """What reports call it."""
    repeats: bool
    """Whether it is read again from its beginning when it ends."""

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sentences))

    def with_inserts(self, tokens: int, inserts: Sequence[tuple[float, list[int]]], start: int = 0) -> list[int]:
        """So many tokens of text with other pieces between its sentences.

        Args:
            tokens: length of the result, the pieces included.
            inserts: depth (0: before the first sentence, 1: behind the last) and token ids of each piece.
            start: the sentence to begin with.

        Raises:
            DataError: the text is shorter than asked, or the pieces alone are longer.
        """
        need = tokens - sum(len(piece) for _, piece in inserts)
        if need < 0:
            raise DataError(f"{tokens} tokens of haystack cannot hold needles of {tokens - need} tokens: ask for more.")
        if need > self.tokens and not self.repeats:
            raise DataError(
                f"The haystack {self.source} has {self.tokens:,} tokens and {need:,} are asked for. Give more text, "
                "shorter lengths, or --repeat to read it again from its beginning."
            )
        pending = sorted(((depth * need, i, piece) for i, (depth, piece) in enumerate(inserts)))
        found: list[int] = []
        text, at = 0, start
        while text < need:
            while pending and pending[0][0] <= text:
                found += pending.pop(0)[2]
            sentence = self.sentences[at % len(self.sentences)][: need - text]
            found += sentence
            text, at = text + len(sentence), at + 1
        for _, _, piece in pending:
            found += piece
        assert len(found) == tokens, (len(found), tokens)
        return found


def read_haystack(source: Path | None, tokenizer: PromptTokenizer, repeat: bool = False) -> Haystack:
    """Read the text of needles.

    Args:
        source: a file or folder of text or .jsonl files. None: the text that comes with megalong, over and over.
        repeat: whether the user's own text may be read again when it ends.

    Raises:
        DataError: the folder is empty, or has no text.
    """
    texts = texts_of(source).read() if source is not None else [BUILTIN.read_text(encoding="utf-8")]
    sentences = [s for text in texts for s in _sentences(text)]
    tokens = [ids for sentence in sentences if (ids := tokenizer.encode(" " + sentence))]
    if not tokens:
        raise DataError(f"{source} holds no sentence: give text files, or leave --haystack out.")
    return Haystack(tokens, str(source or "of megalong"), repeat or source is None)


def _sentences(text: str) -> list[str]:
    return [s for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if (s := " ".join(part.split()))]
