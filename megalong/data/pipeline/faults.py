"""What is wrong with documents is counted by kind; above a limit nothing is laid out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megalong.runtime.errors import DataError

KINDS = {
    "bad_json": "lines that are no JSON object",
    "bad_utf8": "texts that are not UTF-8",
    "bad_character": "texts with half of a surrogate pair, which is no character",
    "no_text": "documents without the text field, or whose text is no string",
    "no_source": "documents without the field that names their source",
    "too_large": "documents above data.max_document_bytes",
    "bad_ids": "tokenized documents with ids outside the vocabulary",
}
"""Faults of one document."""
CUT = "cut_short"
"""A file that ends before its format does, or is damaged from some point on; what stands before is used."""


@dataclass(frozen=True)
class Fault:
    """One document, or the rest of one file, that cannot be used."""

    kind: str
    where: str


def require_few(
    faults: Counter[str], documents: int, examples: Iterable[str], max_share: float, max_cut_files: int
) -> None:
    """Stop when too much is broken.

    Raises:
        DataError: kinds, counts and examples, and the settings that allow more.
    """
    broken = sum(faults[kind] for kind in KINDS)
    shown = "; ".join(list(examples)[:5])
    if faults[CUT] > max_cut_files:
        raise DataError(
            f"{faults[CUT]} files of the source end too early or are damaged ({shown}). Fetch them again; or "
            f"data.max_cut_files={faults[CUT]} uses what stands before the damage."
        )
    if broken > max_share * (documents + broken):
        counts = ", ".join(f"{faults[kind]:,} {what}" for kind, what in KINDS.items() if faults[kind])
        raise DataError(
            f"{broken:,} of {documents + broken:,} documents are broken ({counts}), a share of "
            f"{broken / (documents + broken):.4f} where data.max_fault_share={max_share:g} is allowed. "
            f"Such as: {shown}."
        )
