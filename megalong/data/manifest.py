"""A data folder is what its `manifest.json` says, which is read strictly.

A data folder has `manifest.json` and, for each split, files of sequences: `.npy` (format 1.0, int32 or uint32, C order,
shape [sequences, seq_length + 1], fewer than 2^31 elements) and beside each a short sidecar, `.documents.safetensors`,
that says where documents start. A row has seq_length + 1 tokens because the last one is only ever a label.
What was made by a recipe is uint32 (`dtype`) and says how it was chosen (`made`); plain text has neither key.
A folder of several windows holds the others in folders of their own, each an ordinary data folder, and says how many
steps of a round read each (`steps`, `others`; see `windows`).

Sidecar tensors (all int64), for a file of N sequences:
    starts [total]: positions in [0, seq_length] at which a document starts; the first of every sequence is 0.
    offsets [N + 1]: the starts of sequence i are starts[offsets[i]:offsets[i + 1]].
    valid_lengths [N]: tokens of sequence i that are text; what follows is padding.
    sources [N] (made by a recipe): the source that sequence i begins in, an index into `made["sources"]`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalong.runtime.errors import DataError
from megalong.runtime.files import partial_of
from megalong.runtime.json_file import is_plain_name, read_as, read_json, shown

FORMAT = "megalong-sequences"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_ELEMENTS = 2**31 - 1  # DALI's region indices and many readers count in int32
MAX_ROUND = 100_000
"""Steps of a round, of all windows."""
SPLITS = ("train", "eval")
INT32, UINT32 = "<i4", "<u4"

_AGAIN = "Prepare the data again."


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder as it was when the folder was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class SequenceFile:
    """One .npy of token ids and its sidecar."""

    sequences: int
    tokens: StoredFile
    documents: StoredFile


@dataclass(frozen=True)
class TokenizerInfo:
    """What made the token ids."""

    name: str
    sha256: str
    """Of the tokenizer.json."""
    vocab_size: int
    """Every token id is below this, special tokens included."""
    eos_token_id: int
    """Token that ends a document; also what padding is made of."""


@dataclass(frozen=True)
class OtherWindow:
    """A data folder of a shorter window, inside this one."""

    folder: str
    seq_length: int
    steps: int
    """Steps of a round that read it."""
    sha256: str
    """Of its manifest.json."""


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a data folder without opening its files."""

    seq_length: int
    """Window, tokens; a stored row has one more."""
    tokenizer: TokenizerInfo
    source: str
    """Where the text came from, for people."""
    train: tuple[SequenceFile, ...]
    eval: tuple[SequenceFile, ...]
    """Held out: no document has text in both splits."""
    format: str = field(default=FORMAT)
    version: int = field(default=VERSION)
    dtype: str = field(default=INT32)
    """Of the .npy files."""
    made: dict[str, Any] | None = field(default=None)
    """Settings, shares of sources, lengths before and after, what was dropped and why; None: plain text."""
    steps: int = field(default=1)
    """Steps of a round that read this window, where there are others."""
    others: tuple[OtherWindow, ...] = field(default=())
    """What the other steps of a round read."""

    def files(self, split: str) -> tuple[SequenceFile, ...]:
        """Files of `split` (train or eval)."""
        assert split in SPLITS, split
        return self.train if split == "train" else self.eval

    def sequences(self, split: str) -> int:
        """Number of sequences of `split`."""
        return sum(f.sequences for f in self.files(split))

    def fingerprint(self, split: str) -> str:
        """Identity of what `split` holds: equal fingerprints, equal sequences in equal places."""
        content = [(f.sequences, f.tokens.sha256, f.documents.sha256) for f in self.files(split)]
        return hashlib.sha256(json.dumps([self.seq_length, content]).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        said = dataclasses.asdict(self)
        if self.made is None:
            del said["dtype"], said["made"]
        if not self.others:
            del said["steps"], said["others"]
        (folder / MANIFEST_NAME).write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a data folder.

    Raises:
        DataError: no such folder, no manifest in it, or one that this version does not understand.
    """
    if not folder.is_dir():
        half = partial_of(folder)
        hint = f" {half} exists: the tool that was writing it did not finish; run it again." if half.exists() else ""
        raise DataError(f"There is no data folder {folder}.{hint} tools/prepare_data.py makes one.")
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST_NAME}: it is not a data folder made by tools/prepare_data.py.")
    raw = read_json(path, DataError, _AGAIN)
    met = (raw.get("format"), raw.get("version"))
    if met != (FORMAT, VERSION):
        raise DataError(f"{path} is of format {shown(met)}; this version reads {(FORMAT, VERSION)!r}. {_AGAIN}")
    raw = {"dtype": INT32, "made": None, "steps": 1, "others": []} | raw
    manifest = read_as(Manifest, raw, str(path), DataError, _AGAIN)
    _check(manifest, path)
    return manifest


def _check(manifest: Manifest, path: Path) -> None:
    tokenizer = manifest.tokenizer
    if manifest.dtype not in (INT32, UINT32):
        raise DataError(f"{path}: dtype {shown(manifest.dtype)} is neither {INT32} nor {UINT32}. {_AGAIN}")
    if not 1 <= manifest.seq_length < 2**31 or not 0 <= tokenizer.eos_token_id < tokenizer.vocab_size < 2**31:
        raise DataError(
            f"{path} contradicts itself: seq_length={shown(manifest.seq_length)}, "
            f"vocab_size={shown(tokenizer.vocab_size)}, eos_token_id={shown(tokenizer.eos_token_id)}. {_AGAIN}"
        )
    for other in manifest.others:
        if not is_plain_name(other.folder) or min(other.steps, other.seq_length, manifest.steps) < 1:
            raise DataError(f"{path}: {shown(other)} is no window beside its own. {_AGAIN}")
        if other.seq_length >= manifest.seq_length or manifest.seq_length % other.seq_length:
            raise DataError(
                f"{path}: sequences of {shown(other.seq_length)} tokens do not fill the window of "
                f"{manifest.seq_length:,}: a window beside it must divide it. {_AGAIN}"
            )
    if manifest.steps + sum(other.steps for other in manifest.others) > MAX_ROUND:
        raise DataError(f"{path}: a round of more than {MAX_ROUND:,} steps. {_AGAIN}")
    for file in (*manifest.train, *manifest.eval):
        elements = file.sequences * (manifest.seq_length + 1)
        if file.sequences < 1 or elements > MAX_ELEMENTS:
            raise DataError(
                f"{path}: {shown(file.tokens.name)} holds {shown(elements)} tokens; 1 row to 2^31 - 1 tokens are read."
            )
        for stored in (file.tokens, file.documents):
            if not is_plain_name(stored.name):
                raise DataError(f"{path}: {shown(stored.name)} is not a plain file name of the folder.")
