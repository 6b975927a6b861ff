"""What model lies in a megatron-core checkpoint directory? What `.metadata` lists, its rows read on demand.

The directory is one of `dist_checkpointing` with the `torch_dist` backend: `.metadata` says for each tensor which
blocks it consists of and where each block's record lies in the `*.distcp` files. Any grid of blocks is understood, so
a checkpoint reads the same whatever the layout of the run that wrote it. The optimizer's tensors are not touched.

Each record carries a CRC-32. Where a record is read front to back it is checked on the way, otherwise by a pass of its
own before its first use; `finish` checks what is left.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.committed import COMMIT_MARK, check_backend
from megalong.checkpoint.dcp_metadata import METADATA, read_metadata
from megalong.checkpoint.info import INFO, CheckpointInfo, read_info
from megalong.checkpoint.slices import SliceReader
from megalong.checkpoint.stored_blocks import Block, StoredBlock
from megalong.checkpoint.torch_record import Record, find_record
from megalong.config.schema import ModelConfig
from megalong.convert.table import LAYERS, Entry, table
from megalong.runtime.errors import CheckpointError

_MODEL_KEYS = ("embedding.", "decoder.", "output_layer.", "encoder.", "mtp.", "model.")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_READ = 8 << 20
_MOST_AXES = 8
_Places = list[tuple[MetadataIndex, _StorageInfo]]


@dataclass
class _Checked:
    """A record, and how far its checksum has been followed."""

    record: Record
    file: str
    where: str
    position: int = 0
    crc: int = 0

    @property
    def is_checked(self) -> bool:
        return self.position == self.record.nbytes

    def add(self, data: memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.position += len(data)
        if self.is_checked and self.crc != self.record.crc:
            raise CheckpointError(f"{self.where} was changed after it was written (CRC-32 differs): damaged.")


class MegatronDirectory:
    """The model in a megatron-core checkpoint, opened and checked, read in slices.

    Attributes:
        info: what `megalong.json` says.
        tensors: key -> (shape, dtype) of the model's tensors as they lie on disk.

    Use as a context manager, or call `close()`.

    Raises:
        CheckpointError: half-written, damaged, or not of the `torch_dist` format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_backend(folder)
        self.sums = Checksums(folder)
        self.sums.check(METADATA)
        self.sums.check(INFO)
        self.info: CheckpointInfo = read_info(folder)
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._blocks: dict[str, dict[int, list[StoredBlock]]] = {}
        self._records: dict[StoredBlock, _Checked] = {}
        self._reader = SliceReader(folder)
        self._scratch = np.empty(_READ, dtype=np.uint8)
        metadata, places = read_metadata(folder)
        self._check_files(places)
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata) and key.startswith(_MODEL_KEYS):
                self._add(key, stored, places.get(key, []))

    def check_model(self, model: ModelConfig) -> None:
        """Check that exactly a Llama's tensors are there, each with its right shape and a float dtype.

        Raises:
            CheckpointError: a tensor is missing, unexpected, mis-shaped or mis-typed; it is named.
        """
        known = set()
        for entry in table(model):
            key, stacked = self._key(entry)
            known.add(key)
            if key not in self.tensors:
                raise CheckpointError(f"{self.folder}: tensor {key} is missing; {INFO} asks for it.")
            shape, dtype = self.tensors[key]
            expected = (model.num_hidden_layers, *entry.shape) if stacked else entry.shape
            padded = entry.is_vocabulary and shape[1:] == expected[1:] and shape[:1] >= expected[:1]
            if shape != expected and not padded:
                raise CheckpointError(
                    f"{self.folder}: tensor {key} has shape {list(shape)}, but {INFO} asks for {list(expected)}."
                )
            if dtype not in _DTYPES:
                raise CheckpointError(f"{self.folder}: tensor {key} has dtype {dtype}, which no Llama has.")
        unexpected = sorted(set(self.tensors) - known)
        if unexpected:
            raise CheckpointError(f"{self.folder}: tensor {unexpected[0]} is unexpected; {INFO} describes no such one.")

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self.tensors[self._key(entry)[0]][1]

    def read_into(self, entry: Entry, start: int, stop: int, target: np.ndarray) -> None:
        """Fill `target`, uint8 [rows * row bytes], with rows [start, stop) of a tensor (of its layer).

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        key, stacked = self._key(entry)
        itemsize = self.tensors[key][1].itemsize
        columns = math.prod(entry.shape[1:])
        target_RC = target.reshape(stop - start, columns * itemsize)
        for stored in self._blocks[key].get(entry.layer if stacked and entry.layer is not None else 0, []):
            offsets, sizes = stored.block.low[stacked:], stored.block.size[stacked:]
            low, high = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
            if low >= high:
                continue
            width = math.prod(sizes[1:]) * itemsize
            left = (offsets[1] if len(offsets) > 1 else 0) * itemsize
            at = (low - offsets[0]) * width
            part = target_RC[low - start : high - start]
            record = self._record(stored)
            if width == target_RC.shape[1]:
                self._read_record(record, at, part.reshape(-1).data)
            else:
                self._read_columns(record, at, part[:, left : left + width])

    def rows(self, entry: Entry, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor (of its layer), as a tensor of its own."""
        tensor = torch.empty((stop - start, *entry.shape[1:]), dtype=self.dtype(entry))
        if tensor.numel():
            self.read_into(entry, start, stop, tensor.view(-1).view(torch.uint8).numpy())
        return tensor

    def check_all(self) -> None:
        """Check every record of the model.

        Raises:
            CheckpointError: a record is damaged.
        """
        for by_layer in self._blocks.values():
            for blocks in by_layer.values():
                for stored in blocks:
                    self._record(stored)
        self.finish()

    def finish(self) -> None:
        """Check the rest of every record that was read in part only (vocabulary padding, for one).

        Raises:
            CheckpointError: a record is damaged.
        """
        for record in self._records.values():
            if not record.is_checked:
                self._check_from(record, record.position)

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> MegatronDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _key(self, entry: Entry) -> tuple[str, bool]:
        """Key on disk, and whether the layers are stacked under it (megatron's default) or lie one by one."""
        if entry.layer is None:
            return entry.name, False
        one_by_one = f"{LAYERS}{entry.layer}.{entry.name}"
        return (one_by_one, False) if one_by_one in self.tensors else (entry.key, True)

    def _add(self, key: str, stored: TensorStorageMetadata, places: _Places) -> None:
        shape = tuple(stored.size)
        self.tensors[key] = (shape, stored.properties.dtype)
        by_layer: dict[int, list[StoredBlock]] = {}
        by_offset = {tuple(index.offset): place for index, place in places if index.offset is not None}
        for chunk in stored.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = by_offset.get(offsets)
            if place is None:
                raise CheckpointError(f"{self.folder / METADATA} is damaged: part {offsets} of {key} lies nowhere.")
            stacked = key.startswith(LAYERS) and not key.removeprefix(LAYERS).split(".")[0].isdigit()
            if stacked and sizes[:1] != (1,):
                raise CheckpointError(f"{self.folder}: {key} is not cut between layers, which no megatron-core writes.")
            found = StoredBlock(key, Block(offsets, sizes), place.relative_path, place.offset, place.length)
            by_layer.setdefault(offsets[0] if stacked else 0, []).append(found)
        if not _make_up(shape, [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks]):
            raise CheckpointError(
                f"{self.folder / METADATA} is damaged: the parts of {key} do not make it up; values are missing or "
                "there twice."
            )
        self._blocks[key] = by_layer

    def _check_files(self, storage: dict[str, _Places]) -> None:
        """Every file that the metadata names is there, in full."""
        ends: dict[str, tuple[int, str]] = {}
        for key, places in storage.items():
            for _, place in places:
                name = place.relative_path
                ends[name] = max(ends.get(name, (0, key)), (place.offset + place.length, key))
        for name, (end, key) in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{file} is missing, which holds part of {key}.")
            if file.stat().st_size < end:
                raise CheckpointError(
                    f"{file} is cut short: {file.stat().st_size} bytes, but part of {key} ends at {end}."
                )
            self.sums.check(name, contents=False)

    def _record(self, stored: StoredBlock) -> _Checked:
        found = self._records.get(stored)
        if found is not None:
            return found
        key, file = stored.key, stored.file
        where = f"{self.folder / file}: tensor {key} at {list(stored.block.low)}"
        try:
            record = find_record(lambda at, count: self._reader.read(file, at, count), stored.start, stored.length)
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}.") from error
        if record.dtype != self.tensors[key][1] or record.shape != stored.block.size:
            raise CheckpointError(
                f"{where} has shape {list(record.shape)} and {record.dtype}, not what {METADATA} says."
            )
        found = self._records[stored] = _Checked(record, file, where)
        return found

    def _read_record(self, record: _Checked, at: int, target: memoryview) -> None:
        """Fill `target` with the bytes of a record from `at` on."""
        if not record.is_checked and at != record.position:
            self._check_from(record, record.position)
        self._reader.read_into(record.file, record.record.offset + at, target)
        if not record.is_checked:
            record.add(target)

    def _check_from(self, record: _Checked, start: int) -> None:
        for at in range(start, record.record.nbytes, _READ):
            part = self._scratch[: min(_READ, record.record.nbytes - at)]
            self._reader.read_into(record.file, record.record.offset + at, part.data)
            record.add(part.data)

    def _read_columns(self, record: _Checked, at: int, target_RC: np.ndarray) -> None:
        rows, width = target_RC.shape
        step = max(1, _READ // width)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            part = np.empty(count * width, dtype=np.uint8)
            self._read_record(record, at + row * width, part.data)
            target_RC[row : row + count] = part.reshape(count, width)


def is_megatron(folder: Path) -> bool:
    """Whether a folder looks like a megatron-core checkpoint, whole or not."""
    return (folder / METADATA).is_file() or (folder / COMMIT_MARK).is_file() or any(folder.glob("*.distcp"))


def _make_up(shape: tuple[int, ...], blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether blocks (offsets, sizes) fill a tensor of `shape`: every value is in exactly one of them.

    A block is the sum over its corners of everything beyond a corner, with alternating signs, and in only one way. So
    the blocks fill the tensor exactly when all corners but the tensor's own cancel, however the blocks lie.
    """
    if len(shape) > _MOST_AXES:
        return False
    corners: dict[tuple[int, ...], int] = {}
    for sign, (offsets, sizes) in [(-1, ((0,) * len(shape), shape)), *((1, block) for block in blocks)]:
        for ends in itertools.product((0, 1), repeat=len(shape)):
            corner = tuple(at + size * end for at, size, end in zip(offsets, sizes, ends, strict=True))
            corners[corner] = corners.get(corner, 0) + sign * (-1) ** sum(ends)
    return not any(corners.values())
