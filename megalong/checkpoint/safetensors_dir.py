"""What tensors lie in a Hugging Face directory, and how are slices of them read without loading a file?

The safetensors format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, offsets) and the
tensors' bytes. Headers are read and checked on opening: a shard that is missing, cut short or overlapping, a tensor
that appears twice or that the index does not know, is refused by name.

Pickled weights (`.bin`, `.pth`) are refused: unpickling runs code from the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.reading import SliceReader
from megalong.runtime.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# safetensors' names of the dtypes that a Llama checkpoint may have.
DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the reference implementation's own limit


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (axis 0)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsDirectory:
    """The tensors of a Hugging Face directory, opened and checked, read in slices.

    Args:
        folder: directory with model.safetensors, or shards and their index.
        verify: compare files with `checksums.json`, where there is one, before they are first read.

    Attributes:
        tensors: name -> where it lies.

    Use as a context manager, or call `close()`.

    Raises:
        CheckpointError: no safetensors, or files that are damaged or contradict one another.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder, self._verify = folder, verify
        self.sums = Checksums(folder)
        self._reader = SliceReader(folder)
        self.files = _files_of(folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self.sums.check(file.name, contents=False)
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{file}: tensor {name} is also in {self.tensors[name].file.name}. Remove the wrong file."
                    )
                self.tensors[name] = stored
        _check_index(folder, self.tensors)

    def read_into(self, file: Path, offset: int, target: memoryview) -> None:
        """Fill `target` (bytes) with a file's bytes from `offset` on."""
        if self._verify:
            self.sums.check(file.name)
        self._reader.read_into(file.name, offset, target)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, as a tensor of its own."""
        stored = self.tensors[name]
        target = torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
        if target.numel():
            view = target.view(-1).view(torch.uint8).numpy().data
            self.read_into(stored.file, stored.offset + start * stored.row_bytes, view)
        return target

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def __enter__(self) -> SafetensorsDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_header(file: Path) -> dict[str, Stored]:
    """Names, dtypes, shapes and places of one file's tensors.

    Raises:
        CheckpointError: the file is missing, cut short or damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"a header of {length} bytes in a file of {size} bytes")
            header = json.loads(stream.read(length), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        found = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}. Download or convert it again."
        ) from error
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: item[1].offset):
        if stored.offset != end:
            raise CheckpointError(f"{file}: tensor {name} starts at byte {stored.offset}, expected {end}: damaged.")
        end += stored.nbytes
    if end != size:
        what = "cut short" if size < end else "longer than it should be"
        raise CheckpointError(f"{file} is {what}: its header describes {end} bytes, the file has {size}.")
    return found


def _stored(file: Path, base: int, name: str, entry: Mapping[str, Any]) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {entry['dtype']}; a Llama checkpoint has {', '.join(DTYPES)}."
        )
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    stored = Stored(file, DTYPES[entry["dtype"]], shape, base + start)
    if not all(isinstance(n, int) and n >= 0 for n in shape) or stop - start != stored.nbytes:
        raise ValueError(f"tensor {name} of shape {shape} cannot have {stop - start} bytes")
    return stored


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} appears twice in the header")
        found[key] = value
    return found


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name by the index of a sharded directory; None where there is no index.

    Raises:
        CheckpointError: the index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)["weight_map"]
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{name} is said to be in {file!r}, which is no file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return dict(weight_map)


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    index = read_index(folder)
    if index is not None:
        files = [folder / name for name in sorted(set(index.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{folder}: {', '.join(missing)} missing, which {INDEX} names.")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    loose = sorted(folder.glob("*.safetensors"))
    if loose:
        raise CheckpointError(
            f"{folder} holds {loose[0].name} but neither {SINGLE} nor {INDEX}: part of a sharded checkpoint is missing."
        )
    pickled = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickled[0]}). Unpickling runs code from the file, so only "
            "safetensors are read: save it again with transformers, or use from-meta for Meta's consolidated.*.pth."
        )
    raise CheckpointError(f"{folder} holds no *.safetensors: it is not a Hugging Face model directory.")


def _check_index(folder: Path, tensors: Mapping[str, Stored]) -> None:
    index = read_index(folder)
    if index is None:
        return
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{folder / file} does not hold tensor {name}, which {INDEX} says it does.")
    extra = sorted(set(tensors) - set(index))
    if extra:
        raise CheckpointError(f"{tensors[extra[0]].file} holds tensor {extra[0]}, which {INDEX} does not know.")
