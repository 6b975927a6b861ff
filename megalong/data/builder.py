"""Texts become a data folder: tokenized, held out by content, packed, written whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from megalong.data.manifest import SPLITS, Manifest, TokenizerInfo
from megalong.data.output_folder import output_folder
from megalong.data.packing import Packer
from megalong.data.tokenizer import TextTokenizer
from megalong.data.writer import FILE_ELEMENTS, SplitWriter
from megalong.runtime.errors import DataError

BATCH_CHARACTERS = 4_000_000
"""Text handed to the tokenizer at a time: enough for all cores, small beside memory."""

Document = tuple[bool, np.ndarray]
"""(held out, [n] int32 token ids ending in the end-of-text token)."""


def tokenize(
    texts: Iterable[str], tokenizer: TextTokenizer, *, eval_fraction: float, min_tokens: int = 0
) -> Iterator[Document]:
    """Texts as documents in the same order, those of fewer than `min_tokens` left out.

    Whether a text is held out follows from its content, so that it is the same in the folders of all windows: what one
    stage is evaluated on, no stage before it has trained on.
    """
    for batch in _batches(texts):
        for text, tokens in zip(batch, tokenizer.encode(batch), strict=True):
            if len(tokens) >= max(2, min_tokens):
                yield held_out(text, eval_fraction), tokens


def held_out(text: str, eval_fraction: float) -> bool:
    """Whether a text belongs to the eval split."""
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


def build(
    documents: Iterable[Document],
    out: Path,
    *,
    tokenizer: TokenizerInfo,
    seq_length: int,
    source: str,
    file_elements: int = FILE_ELEMENTS,
    on_document: Callable[[np.ndarray], None] | None = None,
) -> Manifest:
    """Pack documents and write the data folder `out`, which appears under that name only when it is whole.

    Args:
        documents: in a fixed order; the same ones give the same bytes.
        seq_length: window, tokens.
        source: where the text came from, for people.
        file_elements: tokens per file at most (at least one sequence is written to each).
        on_document: called after each document, for progress.

    Raises:
        DataError: `out` exists, or a split came out empty.
    """
    with output_folder(out) as folder:
        packers = {split: Packer(seq_length, tokenizer.eos_token_id) for split in SPLITS}
        writers = {split: SplitWriter(folder, split, seq_length, file_elements) for split in SPLITS}
        for is_held_out, tokens in documents:
            split = "eval" if is_held_out else "train"
            for sequence in packers[split].add(tokens):
                writers[split].write(sequence)
            if on_document is not None:
                on_document(tokens)
        for split in SPLITS:
            for sequence in packers[split].finish():
                writers[split].write(sequence)
            if not writers[split].sequences:
                raise DataError(
                    f"The text gives no {split} sequence at all. Give more documents, or another share of them to "
                    "hold out (eval_fraction)."
                )
        manifest = Manifest(
            seq_length=seq_length,
            tokenizer=tokenizer,
            source=source,
            train=writers["train"].finish(),
            eval=writers["eval"].finish(),
        )
        manifest.write(folder)
    return manifest


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
