"""How are packed sequences put on disk as one split of a data folder?"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors.torch import save_file

from megalong.data.manifest import MAX_ELEMENTS, SequenceFile, StoredFile
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
    """

    def __init__(self, folder: Path, split: str, seq_length: int, file_elements: int = FILE_ELEMENTS) -> None:
        assert file_elements <= MAX_ELEMENTS
        self.folder = folder
        self.split = split
        self.row = seq_length + 1
        self.rows_per_file = max(1, file_elements // self.row)
        self.files: list[SequenceFile] = []
        self.sequences = 0
        self._open: IO[bytes] | None = None
        self._starts: list[list[int]] = []
        self._valid: list[int] = []

    def write(self, sequence: Sequence) -> None:
        """Append one sequence."""
        if self._open is None:
            self._open = self._path().open("wb")
            self._write_header(0)
        self._open.write(np.ascontiguousarray(sequence.tokens, dtype="<i4").data)
        self._starts.append(sequence.starts)
        self._valid.append(sequence.valid_length)
        self.sequences += 1
        if len(self._valid) == self.rows_per_file:
            self._close()

    def finish(self) -> tuple[SequenceFile, ...]:
        """Close the last file; the entries of all files for the manifest."""
        if self._open is not None:
            self._close()
        return tuple(self.files)

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.files):05d}.npy"

    def _write_header(self, rows: int) -> int:
        """The .npy header, whose length does not depend on `rows` (numpy reserves room for a growing first axis)."""
        assert self._open is not None
        self._open.seek(0)
        header = {"descr": "<i4", "fortran_order": False, "shape": (rows, self.row)}
        np.lib.format.write_array_header_1_0(self._open, header)
        return self._open.tell()

    def _close(self) -> None:
        assert self._open is not None
        header = self._write_header(len(self._valid))
        self._open.close()
        self._open = None
        path = self._path()
        assert path.stat().st_size == header + 4 * len(self._valid) * self.row, path
        sidecar = path.with_suffix(".documents.safetensors")
        counts = torch.tensor([0, *(len(s) for s in self._starts)], dtype=torch.int64)
        save_file(
            {
                "starts": torch.tensor([p for s in self._starts for p in s], dtype=torch.int64),
                "offsets": counts.cumsum(0),
                "valid_lengths": torch.tensor(self._valid, dtype=torch.int64),
            },
            sidecar,
        )
        self.files.append(SequenceFile(len(self._valid), _stored(path), _stored(sidecar)))
        self._starts, self._valid = [], []


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, sha256_of(path))
