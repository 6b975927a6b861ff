"""What does a conversion read from? A model directory of any layout, seen as Hugging Face tensors.

Names, shapes, dtypes, and rows on demand: never a whole model in memory. Every layout is one class with this interface
(`weights.HuggingFaceWeights`, `weights.MegatronWeights`, `meta_dir.MetaDirectory`), so whatever can be read can be
written in any layout that there is a writer for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megalong.config.schema import ModelConfig


@dataclass(frozen=True)
class TensorFacts:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Source:
    """A model directory, opened and checked. Use as a context manager, or call `close()`.

    Attributes:
        folder: the directory that is read (for a run_dir, its newest checkpoint).
        config: the complete Hugging Face config.
        model: the shape that it describes.
        tensors: Hugging Face name -> shape and dtype.
    """

    folder: Path
    config: dict[str, Any]
    model: ModelConfig
    tensors: dict[str, TensorFacts]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a Hugging Face tensor."""
        raise NotImplementedError

    def read_into(self, name: str, start: int, stop: int, target: np.ndarray) -> None:
        """Fill `target`, uint8 [rows * row bytes], with rows [start, stop) of a Hugging Face tensor, as stored."""
        target[:] = as_bytes(self.rows(name, start, stop))

    def place(self, name: str) -> Path:
        """The file or folder that a tensor lies in, for errors."""
        return self.folder

    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Name, as this layout has it, -> dtype of every tensor that is stored."""
        return {name: facts.dtype for name, facts in self.tensors.items()}

    def carried(self) -> dict[str, bytes]:
        """Name -> content of the files that travel along, true for the model's window.

        Raises:
            CheckpointError: one of them is damaged.
        """
        return {}

    def finish(self) -> None:
        """Check what nothing has been made of, after all rows have been read.

        Raises:
            CheckpointError: a file is damaged.
        """

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def as_bytes(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, uint8."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
