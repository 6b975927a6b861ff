"""What does a data folder hold, and is it whole? Its `manifest.json`, read strictly.

A data folder has `manifest.json` and, for each split, files of sequences: `.npy` (format 1.0, int32, C order, shape
[sequences, seq_length + 1], fewer than 2^31 elements) and beside each a short sidecar, `.documents.safetensors`,
that says where documents start. A row has seq_length + 1 tokens because the last one is only ever a label.

Sidecar tensors (all int64), for a file of N sequences:
    starts [total]: positions in [0, seq_length] at which a document starts; the first of every sequence is 0.
    offsets [N + 1]: the starts of sequence i are starts[offsets[i]:offsets[i + 1]].
    valid_lengths [N]: tokens of sequence i that are text; what follows is padding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megalong.runtime.errors import DataError
from megalong.runtime.files import partial_of

FORMAT = "megalong-sequences"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_ELEMENTS = 2**31 - 1  # DALI's region indices and many readers count in int32
SPLITS = ("train", "eval")

_T = TypeVar("_T")


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
        (folder / MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")


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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise DataError(f"{path} is damaged: not JSON ({error}). Prepare the data again.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        met = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else raw
        raise DataError(
            f"{path} is of format {met!r}; this version reads {(FORMAT, VERSION)!r}. Prepare the data again."
        )
    manifest = _typed(raw, Manifest, str(path))
    _check(manifest, path)
    return manifest


_NESTED: dict[str, type] = {"StoredFile": StoredFile, "TokenizerInfo": TokenizerInfo}


def _typed(raw: Any, kind: type[_T], where: str) -> _T:
    """`raw` (JSON) as dataclass `kind`: exactly its keys, exactly its types."""
    if not isinstance(raw, dict):
        raise DataError(f"{where}: an object was expected, found {raw!r}.")
    fields = {f.name: f.type for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if set(raw) != set(fields):
        missing, unknown = sorted(set(fields) - set(raw)), sorted(set(raw) - set(fields))
        raise DataError(f"{where}: missing keys {missing}, unknown keys {unknown}. Prepare the data again.")
    values: dict[str, Any] = {}
    for name, declared in fields.items():
        here, value = f"{where}: {name}", raw[name]
        if declared in _NESTED:
            values[name] = _typed(value, _NESTED[declared], here)
        elif declared == "tuple[SequenceFile, ...]":
            if not isinstance(value, list):
                raise DataError(f"{here}: a list was expected, found {value!r}.")
            values[name] = tuple(_typed(v, SequenceFile, f"{here}[{i}]") for i, v in enumerate(value))
        elif type(value).__name__ != declared:  # by name: a bool is not an int here
            raise DataError(f"{here}: {declared} was expected, found {value!r}.")
        else:
            values[name] = value
    return kind(**values)


def _check(manifest: Manifest, path: Path) -> None:
    tokenizer = manifest.tokenizer
    if manifest.seq_length < 1 or not 0 <= tokenizer.eos_token_id < tokenizer.vocab_size:
        raise DataError(
            f"{path} contradicts itself: seq_length={manifest.seq_length}, vocab_size={tokenizer.vocab_size}, "
            f"eos_token_id={tokenizer.eos_token_id}."
        )
    for file in (*manifest.train, *manifest.eval):
        elements = file.sequences * (manifest.seq_length + 1)
        if file.sequences < 1 or elements > MAX_ELEMENTS:
            raise DataError(f"{path}: {file.tokens.name} holds {elements:,} tokens; 1 row to 2^31 - 1 tokens are read.")
        for stored in (file.tokens, file.documents):
            if Path(stored.name).name != stored.name:
                raise DataError(f"{path}: {stored.name!r} is not a plain file name of the folder.")
