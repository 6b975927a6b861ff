"""What tensors lie in a Hugging Face directory, and where? What the checked headers say; rows are read on demand.

The safetensors format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, offsets) and the
tensors' bytes. Headers are read and checked on opening: a shard that is missing, cut short or overlapping, a tensor
that appears twice or that the index does not know, is refused by name. So is a header that is not what the format
says, whoever wrote it.

Pickled weights (`.bin`, `.pth`) are refused: unpickling runs code from the file.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.slices import SliceReader
from megalong.config.schema import ModelConfig
from megalong.convert.table import TIED_OUTPUT, hf_shapes
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import is_plain_name, parse, read_json, shown

ROTARY_TABLE = ".rotary_emb.inv_freq"  # older transformers saved this table, which follows from the config
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# safetensors' names of the dtypes that a Llama checkpoint may have.
DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the reference implementation's own limit
_MOST_AXES = 8  # a Llama's tensors have one or two; sizes are multiplied before they are compared with the file


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


def check_tensors(model: ModelConfig, tensors: Mapping[str, Stored], where: Path) -> None:
    """Check that a directory holds exactly a Llama's tensors, each with its right shape.

    A tied model may repeat its embedding as lm_head.weight, and old files may hold rotary tables: both are redundant.

    Raises:
        CheckpointError: a tensor is missing, unexpected or mis-shaped; it is named.
    """
    expected = hf_shapes(model)
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{where}: tensor {name} {list(shape)} is missing; config.json asks for it.")
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, but config.json asks for "
                f"{list(shape)}."
            )
    for name in tensors:
        tied = model.tie_word_embeddings and name == TIED_OUTPUT
        if name not in expected and not tied and not name.endswith(ROTARY_TABLE):
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name} is unexpected; config.json describes no such one."
            )


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
            header = parse(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"its header is {shown(header)} instead of an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"__metadata__ is {shown(metadata)} instead of names and texts")
        found = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file: {error}. Download or convert it again."
        ) from error
    end = 8 + length
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise CheckpointError(
                f"{file}: tensor {name[:200]} starts at byte {stored.offset}, expected {end}: damaged."
            )
        end += stored.nbytes
    if end != size:
        what = "cut short" if size < end else "longer than it should be"
        raise CheckpointError(f"{file} is {what}: its header describes {end} bytes, the file has {size}.")
    return found


def _stored(file: Path, base: int, name: str, entry: Any) -> Stored:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name[:200]} is described by {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _are_counts(shape, range(_MOST_AXES + 1)) or not _are_counts(offsets, (2,)):
        raise ValueError(f"tensor {name[:200]} is described by {shown(entry)}")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name[:200]} has dtype {dtype[:20]}; a Llama checkpoint has {', '.join(DTYPES)}."
        )
    start, stop = offsets
    stored = Stored(file, DTYPES[dtype], tuple(shape), base + start)
    if stop - start != stored.nbytes:
        raise ValueError(f"tensor {name[:200]} of shape {shape} cannot have {stop - start} bytes")
    return stored


def _are_counts(values: Any, lengths: Container[int]) -> bool:
    """Whether it is a list of so many sizes or places that a file can have."""
    is_list = isinstance(values, list) and len(values) in lengths
    return is_list and all(type(n) is int and 0 <= n < 2**63 for n in values)


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name by the index of a sharded directory; None where there is no index.

    Raises:
        CheckpointError: the index is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    weight_map = read_json(path, CheckpointError, "Download or convert it again.").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} is damaged: weight_map is {shown(weight_map)} instead of tensors and files.")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                f"{path} is damaged: {name[:200]} is said to be in {shown(file)}, which is no file name."
            )
    return weight_map


def _files_of(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    index = read_index(folder)
    if index is not None:
        files = [folder / name for name in sorted(set(index.values()))]
        if (folder / SINGLE).is_file() and folder / SINGLE not in files:
            raise CheckpointError(
                f"{folder} holds both {SINGLE} and {INDEX} with {files[0].name}: transformers would read the first, "
                "others the second. Remove the one that is not meant."
            )
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
