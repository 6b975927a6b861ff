"""Which tensors lie in a `.pth` file of `torch.save`? Those that it describes, each compared with its CRC-32.

The file is mapped, not loaded. The zip format carries a CRC-32 of every storage, which torch does not compare:
here a tensor's bytes are compared before it is handed out, once, by reading them front to back.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalong.checkpoint.torch_archive import Bytes, Described, TorchArchive
from megalong.runtime.errors import CheckpointError

_READ = 8 << 20


class TorchFile:
    """The tensors of one file.

    Args:
        file: what `torch.save` made of a dict of plain tensors.

    Attributes:
        tensors: name -> dtype, shape and place.

    Raises:
        CheckpointError: missing, damaged, or holding anything but a dict of plain tensors.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            # copy-on-write, because torch has no tensors that may not be written
            self._map = np.memmap(file, dtype=np.uint8, mode="c")
            self._archive = TorchArchive(lambda at, count: self._map[at : at + count].tobytes(), 0, len(self._map))
            content = self._archive.content
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
            for name, tensor in content.items():
                if not isinstance(name, str) or not isinstance(tensor, Described):
                    raise ValueError(f"{name!r:.80} is a {type(tensor).__name__}, not a tensor")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} cannot be read as plain tensors: {error}. Download it again.") from error
        self.tensors: dict[str, Described] = dict(content)
        self._checked: set[Bytes] = set()

    def tensor(self, name: str) -> Tensor:
        """A tensor as it lies in the file, mapped; its bytes have been compared with their checksum.

        Raises:
            CheckpointError: the bytes are not those that were written.
        """
        described = self.tensors[name]
        try:
            place = self._archive.bytes_of(described)
        except ValueError as error:
            raise CheckpointError(f"{self.file}: tensor {name} is damaged: {error}. Download it again.") from error
        if place not in self._checked:
            if self._crc(place.offset, place.nbytes) != place.crc:
                raise CheckpointError(
                    f"{self.file}: tensor {name} was changed after it was written (CRC-32 differs): damaged. Download "
                    "it again."
                )
            self._checked.add(place)
        if 0 in described.shape:
            return torch.empty(described.shape, dtype=described.dtype)
        storage = torch.from_numpy(self._map[place.offset : place.offset + place.nbytes]).view(described.dtype)
        return storage.as_strided(described.shape, described.stride, described.start)

    def check_all(self) -> None:
        """Compare the bytes of every tensor that has not been asked for.

        Raises:
            CheckpointError: see `tensor`.
        """
        for name in self.tensors:
            self.tensor(name)

    def _crc(self, offset: int, nbytes: int) -> int:
        crc, buffer = 0, bytearray(min(_READ, nbytes))
        with self.file.open("rb") as stream:
            stream.seek(offset)
            while nbytes:
                part = memoryview(buffer)[: min(len(buffer), nbytes)]
                count = stream.readinto(part)
                if not count:
                    return -1  # cut short meanwhile
                crc = zlib.crc32(part[:count], crc)
                nbytes -= count
        return crc
