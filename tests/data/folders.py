"""Small data folders of known content."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megalong.data.builder import Document, build
from megalong.data.manifest import MANIFEST_NAME, Manifest, OtherWindow, TokenizerInfo, read_manifest
from megalong.runtime.files import sha256_of

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


def make_mixed_folder(out: Path, windows: dict[int, tuple[int, int]], steps: dict[int, int]) -> Manifest:
    """A data folder of several windows, the longest first, of one sequence each document.

    Args:
        windows: window -> (train, held-out) sequences.
        steps: window -> steps of a round.
    """
    (longest, *shorter) = sorted(windows, reverse=True)
    make_folder(out, *_documents(longest, *windows[longest]))
    for window in shorter:
        make_folder(out / f"window-{window}", *_documents(window, *windows[window]))
    return alternate(out, steps)


def alternate(out: Path, steps: dict[int, int]) -> Manifest:
    """Make a data folder, with others in it that are called `window-N`, one of several windows."""
    (longest, *shorter) = sorted(steps, reverse=True)
    others = [OtherWindow(f"window-{w}", w, steps[w], sha256_of(out / f"window-{w}" / MANIFEST_NAME)) for w in shorter]
    manifest = replace(read_manifest(out), steps=steps[longest], others=tuple(others))
    manifest.write(out)
    return manifest


def _documents(window: int, train: int, held_out: int) -> tuple[list[int], int, list[int]]:
    return [window + 1] * train, window, [window + 1] * held_out
