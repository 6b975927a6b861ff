"""The tokenizer that turns text into ids, and which of its ids ends a document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from megalong.data.manifest import TokenizerInfo
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of
from megalong.runtime.json_file import read_json, shown

# Looked for in this order when no tokenizer_config.json names the end of text. Llama 3, Llama 2, GPT-2.
_END_OF_TEXT = ("<|end_of_text|>", "</s>", "<|endoftext|>")
_BEGIN_OF_TEXT = ("<|begin_of_text|>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with what a data folder records of it."""

    tokenizer: Tokenizer
    info: TokenizerInfo

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Each text as one document: int32 ids with the end-of-text token last, nothing else added."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*e.ids, self.info.eos_token_id], dtype=np.int32) for e in encoded]

    def ids(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Of each text its uint32 ids, nothing added."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        encoded.reverse()
        while encoded:  # each is let go once it is an array: it is 50 times as large
            yield np.array(encoded.pop().ids, dtype=np.uint32)


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
        size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        tokenizer.encode_special_tokens = True  # <|end_of_text|> inside a text is text, and ends no document
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception for whatever it cannot read, and Rust's panics, which are none
        raise DataError(f"{file} is not a tokenizer ({' '.join(str(error).split())[:500]}).") from error
    config = file.with_name("tokenizer_config.json")
    info = TokenizerInfo(
        name=file.resolve().parent.name,
        sha256=sha256_of(file),
        vocab_size=size,
        eos_token_id=_eos_token(tokenizer, config),
    )
    return TextTokenizer(tokenizer, info)


def begin_of_text(path: Path) -> int:
    """The token that a text begins with, of a tokenizer that `load_tokenizer` loads.

    Raises:
        DataError: it has none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    tokenizer, config = load_tokenizer(path).tokenizer, file.with_name("tokenizer_config.json")
    return _special(tokenizer, config, "bos_token", _BEGIN_OF_TEXT, "begin-of-text")


def _eos_token(tokenizer: Tokenizer, config: Path) -> int:
    return _special(tokenizer, config, "eos_token", _END_OF_TEXT, "end-of-text")


def _special(tokenizer: Tokenizer, config: Path, key: str, usual: tuple[str, ...], what: str) -> int:
    named: Any = None
    if config.is_file():
        said = named = read_json(config, DataError).get(key)
        if isinstance(named, dict):
            named = named.get("content")
        if not isinstance(named, str | None):
            raise DataError(f"{config}: {key}={shown(said)} must be a token, or an object with its content.")
    for token in [named] if named else usual:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    raise DataError(f"The tokenizer beside {config} has no {what} token ({named or ', '.join(usual)}).")
