"""Which tokenizer turns text into ids, and which of its ids ends a document?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megalong.data.manifest import TokenizerInfo
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of

# Looked for in this order when no tokenizer_config.json names the end of text. Llama 3, Llama 2, GPT-2.
_END_OF_TEXT = ("<|end_of_text|>", "</s>", "<|endoftext|>")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with what a data folder records of it."""

    tokenizer: Tokenizer
    info: TokenizerInfo

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Each text as one document: int32 ids with the end-of-text token last, nothing else added."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*e.ids, self.info.eos_token_id], dtype=np.int32) for e in encoded]


def load_tokenizer(path: Path) -> TextTokenizer:
    """Load a tokenizer from a Hugging Face directory (with tokenizer.json) or from a tokenizer.json itself.

    Raises:
        DataError: no such file, not a tokenizer, or no end-of-text token in it.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"There is no tokenizer at {file}. Give a Hugging Face directory that holds tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise DataError(f"{file} is not a tokenizer ({error}).") from error
    config = file.with_name("tokenizer_config.json")
    info = TokenizerInfo(
        name=file.resolve().parent.name,
        sha256=sha256_of(file),
        vocab_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        eos_token_id=_eos_token(tokenizer, config),
    )
    return TextTokenizer(tokenizer, info)


def _eos_token(tokenizer: Tokenizer, config: Path) -> int:
    named: Any = None
    if config.is_file():
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
    for token in [named] if named else _END_OF_TEXT:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise DataError(f"The tokenizer beside {config} has no end-of-text token ({named or ', '.join(_END_OF_TEXT)}).")
