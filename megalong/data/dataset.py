"""Part of one sequence is read from a data folder through a memory map; the rest is not."""

from __future__ import annotations

import ast
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megalong.data.manifest import INT32, UINT32, Manifest, SequenceFile, StoredFile, read_manifest
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of
from megalong.runtime.json_file import shown

VERIFY_AT_OPEN_BYTES = 64 * 2**20
"""Folders up to this size have their checksums compared whenever they are opened (a fraction of a second)."""

_NAMES = {INT32: "int32", UINT32: "uint32"}
_NPY_HEADER_LIMIT = 1000  # bytes; ours have 118


class Piece(NamedTuple):
    """Positions [start, stop) of a sequence."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Shard:
    path: Path
    tokens_SL: np.memmap
    starts: torch.Tensor
    offsets: torch.Tensor
    valid_lengths: torch.Tensor


class SequenceDataset:
    """The sequences of one split of a data folder, memory-mapped.

    Args:
        folder: data folder.
        split: train or eval.

    Opening reads the manifest, the sizes of all files, their headers and the sidecars; no tokens.

    Raises:
        DataError: the folder is missing, not a data folder, or one of its files is truncated or damaged.
    """

    def __init__(self, folder: Path | str, split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest: Manifest = read_manifest(self.folder)
        self.seq_length = self.manifest.seq_length
        self.fingerprint = self.manifest.fingerprint(split)
        self._shards = [self._open(file) for file in self.manifest.files(split)]
        self._ends = list(accumulate(f.sequences for f in self.manifest.files(split)))
        self.bytes_read = 0
        """Of tokens, by all loaders of this dataset."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def bytes(self) -> int:
        """Size on disk of the split."""
        return sum(f.tokens.bytes + f.documents.bytes for f in self.manifest.files(self.split))

    def read(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a sequence's seq_length + 1, as [stop - start] int32; only these are read.

        Raises:
            DataError: a token id is not below the folder's vocabulary size (the file was damaged).
        """
        shard, row = self._locate(sequence)
        assert 0 <= start < stop <= self.seq_length + 1, (start, stop)
        tokens = np.array(shard.tokens_SL[row, start:stop]).view(np.int32)
        self.check_ids(tokens, sequence)
        return tokens

    def check_ids(self, tokens: np.ndarray, sequence: int) -> None:
        """Count tokens that were read; DataError unless all ids are in [0, vocab_size).

        A wrong id kills a GPU process without a word.
        """
        self.bytes_read += tokens.nbytes
        # as unsigned numbers those below zero are the largest: one pass
        if int(tokens.view(np.uint32).max()) >= self.manifest.tokenizer.vocab_size:
            low, high = int(tokens.min()), int(tokens.max())
            shard, row = self._locate(sequence)
            raise DataError(
                f"{shard.path}, sequence {row}: token ids {low} to {high} in a vocabulary of "
                f"{self.manifest.tokenizer.vocab_size}. The file is damaged; prepare the data again."
            )

    def document_starts(self, sequence: int) -> torch.Tensor:
        """Ascending positions in [0, seq_length] at which documents start, [documents] int64; the first is 0."""
        shard, row = self._locate(sequence)
        return shard.starts[int(shard.offsets[row]) : int(shard.offsets[row + 1])]

    def valid_length(self, sequence: int) -> int:
        """How many of the sequence's seq_length + 1 tokens are text rather than padding."""
        shard, row = self._locate(sequence)
        return int(shard.valid_lengths[row])

    def location(self, sequence: int) -> tuple[Path, int]:
        """File and row of a sequence."""
        shard, row = self._locate(sequence)
        return shard.path, row

    def verify(self) -> None:
        """Read every byte of the split and compare checksums.

        Raises:
            DataError: a file is not what was written.
        """
        for file in self.manifest.files(self.split):
            for stored in (file.tokens, file.documents):
                if sha256_of(self.folder / stored.name) != stored.sha256:
                    raise DataError(
                        f"{self.folder / stored.name} is damaged: its checksum is not the one in the manifest. "
                        "Prepare or copy the data again."
                    )

    def _locate(self, sequence: int) -> tuple[_Shard, int]:
        assert 0 <= sequence < len(self), (sequence, len(self))
        i = bisect_right(self._ends, sequence)
        return self._shards[i], sequence - (self._ends[i - 1] if i else 0)

    def _open(self, file: SequenceFile) -> _Shard:
        for stored in (file.tokens, file.documents):
            self._check_size(stored)
        path = self.folder / file.tokens.name
        shape = (file.sequences, self.seq_length + 1)
        offset = _npy_data_offset(path, shape, self.manifest.dtype)
        # np.memmap and not np.load: the map then starts where the header was just found to end
        tokens = np.memmap(path, dtype=self.manifest.dtype, mode="r", offset=offset, shape=shape)
        sidecar = self.folder / file.documents.name
        try:
            parts = load_file(sidecar)
            starts, offsets, valid = (parts[k] for k in ("starts", "offsets", "valid_lengths"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{sidecar} is damaged ({reason}). Prepare or copy the data again.") from error
        if not _sidecar_fits(starts, offsets, valid, file.sequences, self.seq_length):
            raise DataError(f"{sidecar} does not describe {file.tokens.name}. Prepare or copy the data again.")
        return _Shard(path, tokens, starts, offsets, valid)

    def _check_size(self, stored: StoredFile) -> None:
        path = self.folder / stored.name
        if not path.is_file():
            raise DataError(f"{path} is named in the manifest and is not there. Prepare or copy the data again.")
        size = path.stat().st_size
        if size != stored.bytes:
            raise DataError(
                f"{path} has {size:,} bytes where the manifest says {stored.bytes:,}: it was truncated or replaced. "
                "Prepare or copy the data again."
            )


def open_dataset(
    folder: Path | str,
    split: str,
    *,
    seq_length: int,
    vocab_size: int,
    min_sequences: int = 1,
    verify: bool | None = None,
) -> SequenceDataset:
    """Open a split for a run, or say why it does not fit the run.

    Args:
        seq_length: window of the run, tokens.
        vocab_size: rows of the model's embedding.
        min_sequences: fewest sequences that the run can do with.
        verify: compare checksums. None: only for folders of at most `VERIFY_AT_OPEN_BYTES`.

    Raises:
        DataError: see `SequenceDataset`; also the wrong window, ids outside the vocabulary, too few sequences.
    """
    dataset = SequenceDataset(folder, split)
    manifest = dataset.manifest
    if manifest.seq_length != seq_length:
        raise DataError(
            f"{folder} is cut for a window of {manifest.seq_length:,} tokens and the run has {seq_length:,}. "
            "Give the folder of that window (data.path), or prepare one with "
            f"tools/prepare_data.py --seq-length {seq_length}."
        )
    made_with = manifest.tokenizer
    if made_with.vocab_size > vocab_size:
        raise DataError(
            f"{folder} was made with tokenizer {made_with.name} ({made_with.vocab_size:,} ids) and the model's "
            f"vocabulary is {vocab_size:,}. Prepare the data with the model's own tokenizer."
        )
    if len(dataset) < min_sequences:
        raise DataError(
            f"{folder} has {len(dataset):,} {split} sequences and the run needs at least {min_sequences:,}. "
            "Prepare more text, or lower train.global_batch_size (train) or data.eval_sequences (eval)."
        )
    if verify or (verify is None and dataset.bytes <= VERIFY_AT_OPEN_BYTES):
        dataset.verify()
    return dataset


def _npy_data_offset(path: Path, shape: tuple[int, int], dtype: str) -> int:
    """Bytes of the .npy header, after checking that it announces `dtype` of `shape`."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"format {version}")
            length = int.from_bytes(file.read(2), "little")
            if length > _NPY_HEADER_LIMIT:
                raise ValueError(f"{length} bytes long")
            header = ast.literal_eval(file.read(length).decode("latin1"))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise DataError(f"{path} is damaged: no .npy header ({reason}). Prepare or copy the data again.") from error
        if header != {"descr": dtype, "fortran_order": False, "shape": shape}:
            raise DataError(f"{path} holds {shown(header)} where the manifest says {_NAMES[dtype]} of shape {shape}.")
        if path.stat().st_size != file.tell() + 4 * math.prod(shape):
            raise DataError(
                f"{path} has {path.stat().st_size:,} bytes, which are not {shape[0]:,} rows of {shape[1]:,} "
                f"{_NAMES[dtype]}. Prepare or copy the data again."
            )
        return file.tell()


def _sidecar_fits(starts: torch.Tensor, offsets: torch.Tensor, valid: torch.Tensor, n: int, seq_length: int) -> bool:
    if any(t.dtype != torch.int64 or t.dim() != 1 for t in (starts, offsets, valid)):
        return False
    if len(offsets) != n + 1 or len(valid) != n or int(offsets[0]) != 0 or int(offsets[-1]) != len(starts):
        return False
    if bool((offsets.diff() < 1).any()) or bool((valid < 1).any()) or bool((valid > seq_length + 1).any()):
        return False
    if bool((starts[offsets[:-1]] != 0).any()) or int(starts.max()) > seq_length:
        return False
    ascending = starts.diff() > 0
    ascending[offsets[1:-1] - 1] = True  # from one sequence to the next the positions begin again
    return bool(ascending.all())
