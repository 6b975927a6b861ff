"""A person's own text becomes a data folder for one window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from megalong.data.builder import build, tokenize
from megalong.data.manifest import Manifest
from megalong.data.output_folder import refuse_existing
from megalong.data.texts import texts_of
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime import console
from megalong.runtime.errors import DataError

_T = TypeVar("_T")


def prepare(
    source: Path,
    out: Path,
    tokenizer: Path,
    seq_length: int,
    *,
    eval_fraction: float = 0.01,
    min_tokens: int = 0,
    progress: bool = True,
) -> Manifest:
    """Tokenize and pack the text below `source` into the data folder `out`.

    Args:
        source: file or folder of text and code (one document each), or of .jsonl (plain, .gz, .zst), parquet or a
            `datasets` folder with a "text" field (one document a line or row).
        tokenizer: Hugging Face directory with tokenizer.json, or a tokenizer.json.
        seq_length: window, tokens.
        eval_fraction: share of the documents to hold out, 0 to 1 (exclusive); which ones follows from their content.
        min_tokens: shorter documents are left out; raise it to train on long texts only.
        progress: show a bar in bytes of source on stderr.

    What is in the source and is not read, and documents that are too short, are told on stderr.

    Raises:
        DataError: what is wrong with the source, the tokenizer or the target, or the disk is full.
    """
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction={eval_fraction}: give a share between 0 and 1, such as 0.01.")
    if seq_length < 1:
        raise DataError(f"seq_length={seq_length}: a window has at least one token.")
    refuse_existing(out)  # said before hours of tokenizing, not after
    found = texts_of(source)
    for line in found.left_out:
        console.warn(line)
    text_tokenizer = load_tokenizer(tokenizer)
    with tqdm(total=found.bytes, unit="B", unit_scale=True, desc="tokenizing", disable=not progress) as bar:
        texts = _Counted(found.read(bar.update))
        documents = _Counted(tokenize(texts, text_tokenizer, eval_fraction=eval_fraction, min_tokens=min_tokens))
        manifest = build(documents, out, tokenizer=text_tokenizer.info, seq_length=seq_length, source=str(source))
    if short := texts.count - documents.count:
        console.warn(f"left out: {short:,} of {texts.count:,} documents, of fewer than {max(2, min_tokens)} tokens")
    return manifest


class _Counted(Iterable[_T]):
    """Hands on what it is given, and counts it."""

    def __init__(self, items: Iterable[_T]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[_T]:
        for item in self.items:
            self.count += 1
            yield item
