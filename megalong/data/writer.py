"""Packed sequences are put on disk as one split of a data folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
from safetensors.numpy import save_file

from megalong.data.hashed_file import HashedFile
from megalong.data.manifest import INT32, MAX_ELEMENTS, SequenceFile, StoredFile
from megalong.data.packing import Sequence
from megalong.runtime.files import sha256_of

FILE_ELEMENTS = 2**28  # 1 GiB of int32: easy to copy, far from the format's limit


class SplitWriter:
    """Writes sequences in the order given, starting a new file when one is full.

    Args:
        folder: existing folder to write into.
        split: name that the files begin with.
        seq_length: window; rows have one token more.
        file_elements: tokens a file may hold (at least one row is written to each).
        dtype: of the files.
        first: number of the first file (others are written by other processes).
        rows: sequences of every file, if that is known before they come: it is then hashed while it is written.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        seq_length: int,
        file_elements: int = FILE_ELEMENTS,
        dtype: str = INT32,
        first: int = 0,
        rows: int | None = None,
    ) -> None:
        assert file_elements <= MAX_ELEMENTS
        self.dtype, self.first = dtype, first
        self.folder = folder
        self.split = split
        self.row = seq_length + 1
        self.rows_per_file = rows or max(1, file_elements // self.row)
        assert rows is None or rows * self.row <= MAX_ELEMENTS
        self._known = rows is not None
        self.files: list[SequenceFile] = []
        self.sequences = 0
        self._open: IO[bytes] | HashedFile | None = None
        self._starts: list[list[int]] = []
        self._valid: list[int] = []
        self._sources: list[int] = []

    def write(self, sequence: Sequence) -> None:
        """Append one sequence."""
        tokens = np.ascontiguousarray(sequence.tokens, dtype=self.dtype)
        if self._open is None:
            self._open = HashedFile(self._path()) if self._known else self._path().open("wb")
            self._open.write(self._header(self.rows_per_file))
        self._open.write(tokens.data)
        self._starts.append(sequence.starts)
        self._valid.append(sequence.valid_length)
        if sequence.source is not None:
            self._sources.append(sequence.source)
        self.sequences += 1
        if len(self._valid) == self.rows_per_file:
            self._close()

    def finish(self) -> tuple[SequenceFile, ...]:
        """Close the last file; the entries of all files for the manifest."""
        if self._open is not None:
            self._close()
        return tuple(self.files)

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{self.first + len(self.files):05d}.npy"

    def _header(self, rows: int) -> bytes:
        """The .npy header, whose length does not depend on `rows` (numpy reserves room for a growing first axis)."""
        header = io.BytesIO()
        said = {"descr": self.dtype, "fortran_order": False, "shape": (rows, self.row)}
        np.lib.format.write_array_header_1_0(header, said)
        return header.getvalue()

    def _close(self) -> None:
        assert self._open is not None
        path, header = self._path(), self._header(len(self._valid))
        if isinstance(self._open, HashedFile):
            assert len(self._valid) == self.rows_per_file, (len(self._valid), self.rows_per_file)
            sha256 = self._open.close()
            tokens = StoredFile(path.name, self._open.bytes, sha256)
        else:
            self._open.seek(0)
            self._open.write(header)
            self._open.close()
            tokens = _stored(path)
        self._open = None
        assert path.stat().st_size == len(header) + 4 * len(self._valid) * self.row, path
        sidecar = path.with_suffix(".documents.safetensors")
        tensors = {
            "starts": np.array([p for s in self._starts for p in s], np.int64),
            "offsets": np.cumsum([0, *(len(s) for s in self._starts)], dtype=np.int64),
            "valid_lengths": np.array(self._valid, np.int64),
        }
        if self._sources:
            tensors["sources"] = np.array(self._sources, np.int64)
        save_file(tensors, sidecar)
        self.files.append(SequenceFile(len(self._valid), tokens, _stored(sidecar)))
        self._starts, self._valid, self._sources = [], [], []


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, sha256_of(path))
