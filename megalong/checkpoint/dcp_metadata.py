"""What does `.metadata` of a checkpoint folder say? Which block of which tensor lies where, as plain checked values.

The file is a pickle of a few dataclasses. It can give their fields any values, and the classes themselves other
attributes; so it is read into empty stand-ins, made anew for each file, and the real dataclasses are made from what
was found to have the types that they declare. Any other name in the file is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import is_plain_name, shown

METADATA = ".metadata"


def read_metadata(folder: Path) -> tuple[Metadata, dict[str, list[tuple[MetadataIndex, _StorageInfo]]]]:
    """The metadata of a checkpoint folder, and by key where its parts lie.

    Only what says which tensors there are and where they lie is kept. Every size and place is a count, every file a
    name in the folder, no two parts share bytes, and the parts of a tensor have as many axes as it has.

    Raises:
        CheckpointError: missing, damaged, or holding what no checkpoint holds.
    """
    path = folder / METADATA
    try:
        found = _Unpickler(path.read_bytes()).load()
        state = {_text(key): _stored(value) for key, value in _dict(found, "state_dict_metadata").items()}
        storage: dict[MetadataIndex, _StorageInfo] = {}
        by_key: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for raw_index, raw_place in _dict(found, "storage_data").items():
            index, place = _index(raw_index), _place(raw_place)
            if index in storage:
                _wrong(f"{index.fqn} at {index.offset} lies in two places")
            storage[index] = place
            by_key.setdefault(index.fqn, []).append((index, place))
        _check_apart(storage)
        return Metadata(state, storage_data=storage), by_key
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a whole checkpoint.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {str(error)[:500]}.") from error


class _StandIn:
    """An instance of a dataclass or enumeration as the pickle describes it."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


_STAND_INS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "StorageMeta",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


class _Unpickler(pickle.Unpickler):
    """Reads `.metadata`; anything that torch.distributed.checkpoint does not write there is refused."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._made: dict[str, type[_StandIn]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _STAND_INS.get(module, ()):
            return self._made.setdefault(name, type(name, (_StandIn,), {}))
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch.serialization", "_get_layout"):
            return self._made.setdefault(name, type(name, (_StandIn,), {}))
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


def _wrong(what: str) -> NoReturn:
    raise ValueError(what)


def _state(value: Any, name: str) -> Any:
    """The state of an instance of the class of that name."""
    if not isinstance(value, _StandIn) or type(value).__name__ != name:
        _wrong(f"a {type(value).__name__} stands where a {name} should")
    return value.state


def _fields(value: Any, name: str) -> dict[str, Any]:
    state = _state(value, name)
    return state if type(state) is dict else _wrong(f"a {name} without fields")


def _dict(metadata: Any, name: str) -> dict[Any, Any]:
    found = _fields(metadata, "Metadata").get(name)
    return found if isinstance(found, dict) else _wrong(f"{name} is a {type(found).__name__}")


def _text(value: Any) -> str:
    return value if type(value) is str else _wrong(f"{shown(value)} stands where a name should")


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**63 else _wrong(f"{shown(value)} stands where a count should")


def _size(value: Any) -> torch.Size:
    if not isinstance(value, tuple):  # torch.Size is one
        _wrong(f"{shown(value)} stands where sizes should")
    return torch.Size([_count(n) for n in value])


def _stored(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(value).__name__ == "BytesStorageMetadata" and isinstance(value, _StandIn):
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    size, chunks, properties = (fields.get(name) for name in ("size", "chunks", "properties"))
    if type(chunks) is not list:
        _wrong("a tensor without a list of parts")
    parts = [_fields(chunk, "ChunkStorageMetadata") for chunk in chunks]
    boxes = [ChunkStorageMetadata(_size(part.get("offsets")), _size(part.get("sizes"))) for part in parts]
    dtype, *_ = _state(properties, "TensorProperties")
    if not isinstance(dtype, torch.dtype):
        _wrong(f"{shown(dtype)} stands where a dtype should")
    shape = _size(size)
    if any(len(box.offsets) != len(shape) or len(box.sizes) != len(shape) for box in boxes):
        _wrong(f"the parts of a tensor of shape {list(shape)} have other axes")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, boxes)


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields.get("fqn")),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name: Any = fields.get("relative_path")
    if not is_plain_name(name):
        _wrong(f"{shown(name)} is no file of the folder")
    if fields.get("transform_descriptors"):
        _wrong(f"{name} is compressed or encrypted, which is not read")
    return _StorageInfo(name, _count(fields.get("offset")), _count(fields.get("length")))


def _check_apart(storage: dict[MetadataIndex, _StorageInfo]) -> None:
    """No two parts lie on the same bytes: one tensor's would be read as another's."""
    end, before = ("", 0), ""
    for index, place in sorted(storage.items(), key=lambda item: (item[1].relative_path, item[1].offset)):
        if (place.relative_path, place.offset) < end:
            _wrong(f"{index.fqn} and {before} share bytes of {place.relative_path}")
        end, before = (place.relative_path, place.offset + place.length), index.fqn
