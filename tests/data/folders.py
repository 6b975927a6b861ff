"""Small data folders of known content."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megalong.data.builder import Document, build
from megalong.data.manifest import Manifest, TokenizerInfo

EOS = 0
VOCAB = 1000
COUNTING = TokenizerInfo(name="counting", sha256="0" * 64, vocab_size=VOCAB, eos_token_id=EOS)


def counting_documents(lengths: list[int], is_held_out: bool = False) -> list[Document]:
    """Documents of the given numbers of tokens (end-of-text included) whose ids count on from one to the next."""
    documents, token = [], 0
    for length in lengths:
        ids = 1 + (token + np.arange(length)) % (VOCAB - 1)
        ids[-1] = EOS
        token += length
        documents.append((is_held_out, ids.astype(np.int32)))
    return documents


def make_folder(
    out: Path, lengths: list[int], seq_length: int, held_out: list[int] | None = None, file_elements: int = 2**20
) -> Manifest:
    """A data folder of counting documents; `held_out` are the lengths of those of the eval split."""
    documents = counting_documents(lengths) + counting_documents(held_out or [seq_length + 1], is_held_out=True)
    return build(
        documents, out, tokenizer=COUNTING, seq_length=seq_length, source="counting", file_elements=file_elements
    )
