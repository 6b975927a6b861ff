"""How does a rank fill its own tensors from a checkpoint of any layout? From the stored blocks that they overlap.

megatron-core describes what a rank holds as a tree of `ShardedTensor`s: key, place in the whole tensor, memory. Each is
filled in place from the blocks on disk that it overlaps: their places come from `.metadata`, read without unpickling
anything but plain descriptions, and their bytes are read in slices, so that a rank needs little memory beside its own
share.
Nothing in a checkpoint can run code (megatron-core's own `dist_checkpointing.load` unpickles whatever it finds).

A record that is read as a whole is compared with its CRC-32 on the way. One that is read in part is not: the caller has
compared the files with their SHA-256.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from megalong.checkpoint.committed import check_backend
from megalong.checkpoint.dcp_metadata import METADATA, read_metadata
from megalong.checkpoint.plain_values import holds_nothing
from megalong.checkpoint.slices import SliceReader
from megalong.checkpoint.stored_blocks import Block, StoredBlock
from megalong.checkpoint.torch_record import Record, find_record
from megalong.runtime import watchdog
from megalong.runtime.errors import CheckpointError

_READ = 8 << 20  # bytes brought into memory at a time where they cannot be read in place
_SEEK = 256 << 10  # bytes from which a stretch is worth a read of its own; shorter ones are read with what lies between
_EXTRA = "._extra_state/"


@dataclass(frozen=True)
class _Filling:
    """What of a stored block goes where."""

    stored: StoredBlock
    inside: tuple[int, ...]
    """First element in the stored block, along every axis."""
    target: Tensor
    """A view of the memory to fill."""


def entries_of(tree: Any) -> list[ShardedTensor]:
    """The tensors of a tree of megatron-core's, with halves that are saved apart (gate and up) taken apart.

    Their memory is that of the tree: whoever fills it has filled the tree.
    """
    return [leaf for leaf in nested_values(load_preprocess(tree)[0]) if isinstance(leaf, ShardedTensor)]


class ShardedFolder:
    """The tensors of a checkpoint folder, by megatron-core's keys.

    Attributes:
        stored: key -> (shape, dtype) of every tensor, the optimizer's too.

    Use as a context manager, or call `close()`.

    Raises:
        CheckpointError: half-written, damaged, or not of the `torch_dist` format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_backend(folder)
        self.stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._blocks: dict[str, list[StoredBlock]] = {}
        self._extra: list[StoredBlock] = []
        self._records: dict[StoredBlock, Record] = {}
        try:
            self._read_metadata()
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{folder / METADATA} is damaged: {type(error).__name__}: {error}.") from error
        self._reader = SliceReader(folder, give_back=False)  # the ranks of a machine read much of the same

    def fill(self, entries: Iterable[ShardedTensor]) -> None:
        """Fill the memory of `entries`; values are cast to its dtype.

        Where an entry allows another shape (rows that pad the vocabulary), what is not stored becomes zero.

        Raises:
            CheckpointError: a tensor is missing, of another shape, not whole, or damaged; it is named.
        """
        fillings = [filling for entry in entries for filling in self._plan(entry)]
        with torch.no_grad():
            for number, filling in enumerate(sorted(fillings, key=lambda f: (f.stored.file, f.stored.start)), 1):
                watchdog.part("tensor", number, len(fillings))
                self._fill_from(filling)

    def check_extra_states(self, rank: int = 0, ranks: int = 1) -> None:
        """Check that the modules' extra states hold nothing; each of `ranks` looks at its share.

        Raises:
            CheckpointError: one holds something.
        """
        for stored in self._extra[rank::ranks]:
            if stored.length > _READ or not holds_nothing(self._reader.read(stored.file, stored.start, stored.length)):
                raise CheckpointError(
                    f"{self.folder / stored.file}: {stored.key} holds something. FP8 statistics and other extra states "
                    "are not read, because that would run code from the file. Convert the checkpoint with "
                    "`python tools/convert.py megatron-to-hf`, which takes the weights alone, and start from that."
                )

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> ShardedFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_metadata(self) -> None:
        metadata, places = read_metadata(self.folder)
        for key, described in metadata.state_dict_metadata.items():
            found = places.get(key, [])
            if isinstance(described, TensorStorageMetadata):
                self.stored[key] = (tuple(described.size), described.properties.dtype)
                by_low = {tuple(index.offset): place for index, place in found if index.offset is not None}
                for chunk in described.chunks:
                    block = Block(tuple(chunk.offsets), tuple(chunk.sizes))
                    if block.low not in by_low:
                        raise ValueError(f"part {block.low} of {key} lies nowhere")
                    self._blocks.setdefault(key, []).append(self._stored_block(key, block, by_low[block.low]))
            elif isinstance(described, BytesStorageMetadata) and _EXTRA in key:
                self._extra += [self._stored_block(key, Block((), ()), place) for _, place in found]

    def _stored_block(self, key: str, block: Block, place: Any) -> StoredBlock:
        if Path(place.relative_path).name != place.relative_path:
            raise ValueError(f"{key} lies in {place.relative_path!r}")
        return StoredBlock(key, block, place.relative_path, place.offset, place.length)

    def _plan(self, entry: ShardedTensor) -> Iterator[_Filling]:
        """Where the blocks of one tensor come from; nothing is read yet."""
        if entry.key not in self.stored:
            raise CheckpointError(f"{self.folder} cannot be loaded into this model: it has no tensor {entry.key}.")
        shape, _ = self.stored[entry.key]
        wanted, flexible = tuple(entry.global_shape), entry.allow_shape_mismatch
        if shape[flexible:] != wanted[flexible:] or len(shape) != len(wanted):
            raise CheckpointError(
                f"{self.folder} cannot be loaded into this model: tensor {entry.key} has shape {list(shape)}, the "
                f"model {list(wanted)}."
            )
        assert entry.data is not None, entry.key
        target = entry.data.detach()[(None,) * entry.prepend_axis_num]
        mine = Block(tuple(entry.global_offset), tuple(target.shape))
        if flexible:
            target.zero_()
        there = mine.common(Block((0,) * len(shape), shape))
        if there is None:
            return
        stored = self._blocks.get(entry.key, [])
        shared = [(one, common) for one in stored if (common := one.block.common(there)) is not None]
        if sum(common.volume for _, common in shared) != there.volume or any(
            a.common(b) is not None for (_, a), (_, b) in itertools.combinations(shared, 2)
        ):
            raise CheckpointError(f"{self.folder / METADATA} is damaged: the parts of {entry.key} do not make it up.")
        for one, common in shared:
            view = target
            for axis, (at, count) in enumerate(zip(common.low, common.size, strict=True)):
                view = view.narrow(axis, at - mine.low[axis], count)
            inside = tuple(a - b for a, b in zip(common.low, one.block.low, strict=True))
            yield _Filling(one, inside, view)

    def _fill_from(self, filling: _Filling) -> None:
        stored = filling.stored
        where = f"{self.folder / stored.file}: tensor {stored.key} at {list(stored.block.low)}"
        record = self._record(stored, where)
        reading = _Reading(self._reader, stored.file, record)
        reading.fill(filling.target, 0, stored.block.size, filling.inside)
        if reading.position == record.nbytes and reading.crc != record.crc:
            raise CheckpointError(f"{where} was changed after it was written (CRC-32 differs): damaged.")

    def _record(self, stored: StoredBlock, where: str) -> Record:
        if stored not in self._records:
            try:
                found = find_record(lambda at, n: self._reader.read(stored.file, at, n), stored.start, stored.length)
            except CheckpointError as error:
                raise CheckpointError(f"{where}: {error}.") from error
            if found.shape != stored.block.size or found.dtype != self.stored[stored.key][1]:
                raise CheckpointError(
                    f"{where} has shape {list(found.shape)} and {found.dtype}, not what {METADATA} says."
                )
            self._records[stored] = found
        return self._records[stored]


class _Reading:
    """Reads blocks of one record.

    Attributes:
        position: bytes read front to back so far.
        crc: their CRC-32.
    """

    def __init__(self, reader: SliceReader, file: str, record: Record) -> None:
        self._reader, self._file, self._record = reader, file, record
        self.position = self.crc = 0

    def fill(self, target: Tensor, at: int, sizes: tuple[int, ...], low: tuple[int, ...]) -> None:
        """Fill `target` with the block from `low` on of a region of shape `sizes` that begins at element `at`."""
        if not sizes:
            self._values(target, at)
            return
        row = math.prod(sizes[1:])
        start, itemsize = at + low[0] * row, self._record.dtype.itemsize
        whole_rows = tuple(target.shape[1:]) == sizes[1:]
        if whole_rows and (self._in_place(target) or target.numel() * itemsize <= _READ):
            self._values(target, start)
        elif len(sizes) > 1 and (row * itemsize > _READ or (not whole_rows and target[0].numel() * itemsize >= _SEEK)):
            for number in range(target.shape[0]):
                self.fill(target[number], start + number * row, sizes[1:], low[1:])
        else:
            step = max(1, _READ // (row * itemsize))
            for first in range(0, target.shape[0], step):
                some = target[first : first + step]
                block = torch.empty((some.shape[0], *sizes[1:]), dtype=self._record.dtype)
                self._values(block, start + first * row)
                for axis in range(1, len(sizes)):
                    block = block.narrow(axis, low[axis], some.shape[axis])
                some.copy_(block)

    def _in_place(self, target: Tensor) -> bool:
        return target.is_cpu and target.dtype == self._record.dtype and target.is_contiguous()

    def _values(self, target: Tensor, at: int) -> None:
        """Fill a target with consecutive elements of the record."""
        place = target if self._in_place(target) else torch.empty(target.shape, dtype=self._record.dtype)
        # a contiguous tensor may have any stride along an axis of size 1
        data = place.as_strided((place.numel(),), (1,)).view(torch.uint8).numpy().data
        offset = at * self._record.dtype.itemsize
        for first in range(0, len(data), _READ):
            some = data[first : first + _READ]
            self._reader.read_into(self._file, self._record.offset + offset + first, some)
            if offset + first == self.position:
                self.crc = zlib.crc32(some, self.crc)
                self.position += len(some)
        if place is not target:
            target.copy_(place)
