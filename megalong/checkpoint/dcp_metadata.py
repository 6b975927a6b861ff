"""What does `.metadata` of a torch.distributed.checkpoint folder say? Read without running what a pickle could run.

The file is a pickle of a few dataclasses. Only those are made; any other name in it is refused.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megalong.runtime.errors import CheckpointError

METADATA = ".metadata"


def read_metadata(folder: Path) -> tuple[Metadata, dict[str, list[tuple[MetadataIndex, _StorageInfo]]]]:
    """The metadata of a checkpoint folder, and by key where its parts lie.

    Raises:
        CheckpointError: missing, damaged, or holding what no checkpoint holds.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        by_key: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for index, place in (metadata.storage_data or {}).items():
            by_key.setdefault(index.fqn, []).append((index, place))
        return metadata, by_key
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a whole checkpoint.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error


_METADATA_CLASSES = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
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


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata`; anything that torch.distributed.checkpoint does not write there is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
