"""Every byte of a data folder is held against its manifest, and some of it is shown as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from megalong.data.dataset import SequenceDataset
from megalong.data.manifest import MANIFEST_NAME, SPLITS, Manifest, read_manifest
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of

AROUND = 24
"""Tokens on either side of a boundary that are shown."""


def check_folder(folder: Path, tokenizer: Path | None = None) -> Iterator[str]:
    """Verify checksums, ids, boundaries and counts; lines that tell what is there.

    Args:
        tokenizer: what the data was made with, to show text; None: text is not shown.

    Raises:
        DataError: something is not what the manifest says, or the tokenizer is another one.
    """
    manifest = read_manifest(folder)
    made_with = manifest.tokenizer
    if manifest.others:
        windows = [f"{manifest.steps} of window {manifest.seq_length:,}"]
        windows += [f"{other.steps} of {other.seq_length:,}, packed ({other.folder})" for other in manifest.others]
        yield f"{folder}: steps alternate, in a round {', '.join(windows)}"
    yield f"{folder}: window {manifest.seq_length:,}, tokenizer {made_with.name} of {made_with.vocab_size:,} tokens"
    decoder = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        if loaded.info.sha256 != made_with.sha256:
            raise DataError(
                f"{folder} was made with tokenizer {made_with.name} ({made_with.sha256[:12]}), not with {tokenizer} "
                f"({loaded.info.sha256[:12]})."
            )
        decoder = loaded.tokenizer
    for split in SPLITS:
        yield from _split(SequenceDataset(folder, split), split, decoder)
    if manifest.made is not None:
        yield from _shares(manifest)
    for other in manifest.others:
        inner = folder / other.folder
        if sha256_of(inner / MANIFEST_NAME) != other.sha256:
            raise DataError(f"{inner} is not what {folder} was made with: its {MANIFEST_NAME} has changed.")
        yield from check_folder(inner, tokenizer)


def _split(dataset: SequenceDataset, split: str, decoder: Tokenizer | None) -> Iterator[str]:
    dataset.verify()
    documents = padding = 0
    boundary = None
    for sequence in range(len(dataset)):
        dataset.read(sequence, 0, dataset.seq_length + 1)  # refuses ids outside the vocabulary
        starts = dataset.document_starts(sequence)
        documents += len(starts)
        padding += dataset.seq_length + 1 - dataset.valid_length(sequence)
        if boundary is None and len(starts) > 1:
            boundary = sequence, int(starts[1])
    tokens = len(dataset) * dataset.seq_length
    yield (
        f"{split}: {len(dataset):,} sequences, {tokens:,} tokens, {documents:,} pieces of documents, {padding:,} of "
        "padding; checksums, ids and boundaries are sound"
    )
    if decoder is not None and boundary is not None:
        sequence, at = boundary
        before = dataset.read(sequence, max(0, at - AROUND), at)
        after = dataset.read(sequence, at, min(at + AROUND, dataset.seq_length + 1))
        yield f"  sequence {sequence}, boundary at {at:,}:"
        yield f"  ...{decoder.decode(before.tolist(), skip_special_tokens=False)!r}"
        yield f"  | {decoder.decode(after.tolist(), skip_special_tokens=False)!r}..."


def _shares(manifest: Manifest) -> Iterator[str]:
    made = manifest.made
    assert made is not None
    try:
        tokens = {str(name): int(count) for name, count in made["tokens"].items()}
        total = sum(tokens.values())
        rows = manifest.sequences("train")
        yield f"stage {made['stage']}, seed {made['seed']}; tokens by source:"
        for name, count in tokens.items():
            yield f"  {name:<24} {count:>16,}  {count / total:8.4%}"
        dropped, faults = made["documents"]["dropped"], made["documents"]["faults"]
        left_out = ", ".join(f"{count:,} {why}" for why, count in {**dropped, **faults}.items() if count) or "nothing"
        yield f"  left out of {made['documents']['read']:,} documents: {left_out}"
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"made in the manifest is damaged ({type(error).__name__}: {error}).") from error
    if not (rows - 1) * manifest.seq_length < total <= rows * manifest.seq_length + 1:
        raise DataError(f"The manifest tells of {total:,} tokens and of {rows:,} sequences: they do not fit.")
