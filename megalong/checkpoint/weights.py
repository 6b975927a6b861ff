"""How are two directories compared when one is Hugging Face's and one megatron-core's? Both are seen as Hugging Face
tensors: names, shapes, dtypes, and rows on demand, never a whole model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.hf import Entry, Piece, check_tensors, hf_shapes, megatron_runs_between, table
from megalong.checkpoint.megatron_dir import MegatronDirectory, is_megatron
from megalong.checkpoint.output import row_blocks
from megalong.checkpoint.pointer import resolve
from megalong.checkpoint.safetensors_dir import SafetensorsDirectory
from megalong.checkpoint.to_hf import export_config, is_hf
from megalong.checkpoint.to_megatron import dtype_name
from megalong.config.schema import ModelConfig
from megalong.model.llama import model_from_hf, read_hf_config
from megalong.runtime.errors import CheckpointError


@dataclass(frozen=True)
class TensorFacts:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """A model directory of either kind. Use as a context manager, or call `close()`.

    Attributes:
        kind: "Hugging Face" or "Megatron".
        folder: the directory that is read (for a run_dir, its newest checkpoint).
        config: the complete Hugging Face config.
        model: the shape that it describes.
        tensors: Hugging Face name -> shape and dtype.
        sums: the directory's checksums.
    """

    kind: str
    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    tensors: dict[str, TensorFacts]
    sums: Checksums

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a Hugging Face tensor."""
        raise NotImplementedError

    def whole(self, name: str) -> Tensor:
        """A whole Hugging Face tensor."""
        return self.rows(name, 0, self.tensors[name].shape[0])

    def extra(self) -> Mapping[str, Any]:
        """What only this kind of directory knows (stage, step, versions)."""
        return {}

    def check_files(self) -> str:
        """Compare every file with its checksum; returns what was checked, in words.

        Raises:
            CheckpointError: a file is damaged; it is named.
        """
        count = self.sums.check_all()
        return f"SHA-256 of {count} files right" if count else "none here (not written by megalong)"

    def size(self) -> int:
        """Bytes of all files of the directory."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def close(self) -> None:
        """Close the files."""
        raise NotImplementedError

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class HuggingFaceWeights(Weights):
    """A Hugging Face directory."""

    kind = "Hugging Face"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_hf_config(folder)
        self.model = model_from_hf(self.config, str(folder / "config.json"))
        self._source = SafetensorsDirectory(folder)
        check_tensors(self.model, self._source.tensors, folder)
        self.sums = self._source.sums
        stored = self._source.tensors
        self.tensors = {name: TensorFacts(shape, stored[name].dtype) for name, shape in hf_shapes(self.model).items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.rows(name, start, stop)

    def close(self) -> None:
        self._source.close()


class MegatronWeights(Weights):
    """A megatron-core checkpoint."""

    kind = "Megatron"

    def __init__(self, folder: Path) -> None:
        self._source = MegatronDirectory(resolve(folder))
        self.folder = self._source.folder
        self.model = model_from_hf(self._source.info.hf_config, f"{self.folder / 'megalong.json'}: hf_config")
        self._source.check_model(self.model)
        self.sums = self._source.sums
        self._places: dict[str, tuple[Entry, Piece]] = {}
        self.tensors = {}
        for entry in table(self.model):
            for piece in entry.pieces:
                self._places[piece.hf_name] = (entry, piece)
                self.tensors[piece.hf_name] = TensorFacts(entry.hf_shape(piece), self._source.dtype(entry))
        first = next(iter(self.tensors.values()))
        self.config = export_config(self._source, dtype_name(first.dtype))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry, piece = self._places[name]
        parts = [self._source.rows(entry, a, b) for a, b in megatron_runs_between(piece, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check_files(self) -> str:
        if self.sums.sums is None:
            for entry in table(self.model):
                for start, stop in row_blocks(entry.shape[0], math.prod(entry.shape[1:]) * 4):
                    self._source.rows(entry, start, stop)
            self._source.finish()
            return "no SHA-256 here; CRC-32 of all tensors right"
        return super().check_files()

    def extra(self) -> Mapping[str, Any]:
        info = self._source.info
        return {
            "stage": info.stage,
            "step": info.step,
            "consumed_samples": info.consumed_samples,
            "versions": info.versions,
        }

    def close(self) -> None:
        self._source.close()


def open_weights(folder: Path) -> Weights:
    """Open a directory of either kind.

    Args:
        folder: a Hugging Face directory, a Megatron checkpoint, or the run_dir of a training run.

    Raises:
        CheckpointError: neither, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder.")
    if is_megatron(folder) or (folder / "checkpoints").is_dir() or (folder / "latest").is_file():
        return MegatronWeights(folder)
    if is_hf(folder) or any(folder.glob("*.safetensors")):
        return HuggingFaceWeights(folder)
    if any(folder.glob("consolidated.*.pth")):
        raise CheckpointError(f"{folder} is in Meta's original layout: convert it with from-meta first.")
    raise CheckpointError(f"{folder} is neither a Hugging Face directory nor a Megatron checkpoint.")
