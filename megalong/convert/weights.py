"""How are directories of different kinds compared? As sources of the same Hugging Face tensors, whatever they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.info import HF_FILES, INFO
from megalong.checkpoint.pointer import resolve
from megalong.convert.blocks import row_blocks
from megalong.convert.dtypes import dtype_name
from megalong.convert.hf_folder import CONFIG, for_window, is_hf, read_carried, read_config
from megalong.convert.megatron_dir import MegatronDirectory, is_megatron
from megalong.convert.safetensors_dir import SafetensorsDirectory, check_tensors
from megalong.convert.source import Source, TensorFacts
from megalong.convert.table import TIED_OUTPUT, Entry, Piece, hf_shapes, megatron_spans_between, table
from megalong.model.llama import model_from_hf, with_dtype
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import read_json


class Weights(Source):
    """A model directory that may be compared with another.

    Attributes:
        kind: "Hugging Face" or "Megatron".
        sums: the directory's checksums.
    """

    kind: str
    sums: Checksums

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


class HuggingFaceWeights(Weights):
    """A Hugging Face directory."""

    kind = "Hugging Face"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.model = model_from_hf(self.config, str(folder / CONFIG))
        self._files = SafetensorsDirectory(folder)
        check_tensors(self.model, self._files.tensors, folder)
        self.sums = self._files.sums
        stored = self._files.tensors
        self.tensors = {name: TensorFacts(shape, stored[name].dtype) for name, shape in hf_shapes(self.model).items()}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._files.rows(name, start, stop)

    def read_into(self, name: str, start: int, stop: int, target: np.ndarray) -> None:
        stored = self._files.tensors[name]
        self._files.read_into(stored.file, stored.offset + start * stored.row_bytes, target.data)

    def place(self, name: str) -> Path:
        return self._files.tensors[name].file

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {name: stored.dtype for name, stored in self._files.tensors.items()}

    def carried(self) -> dict[str, bytes]:
        return read_carried(self.folder)

    def check_tied(self) -> None:
        """Check that a tied model's own lm_head is the embedding: converting would silently drop anything else.

        Raises:
            CheckpointError: it is not.
        """
        stored = self._files.tensors.get(TIED_OUTPUT)
        if not self.model.tie_word_embeddings or stored is None:
            return
        if stored.shape != (self.model.vocab_size, self.model.hidden_size):
            raise CheckpointError(f"{stored.file}: tensor {TIED_OUTPUT} has shape {list(stored.shape)}.")
        for start, stop in row_blocks(self.model.vocab_size, stored.row_bytes):
            head = self.rows(TIED_OUTPUT, start, stop)
            if not torch.equal(head.view(-1), self.rows("model.embed_tokens.weight", start, stop).view(-1)):
                raise CheckpointError(
                    f"{stored.file}: tensor {TIED_OUTPUT} differs from the embedding, but config.json says "
                    "tie_word_embeddings. Set it to false to keep the tensor, or remove the tensor."
                )

    def close(self) -> None:
        self._files.close()


class MegatronWeights(Weights):
    """A megatron-core checkpoint, or the newest one of a run_dir."""

    kind = "Megatron"

    def __init__(self, folder: Path) -> None:
        self._files = MegatronDirectory(resolve(folder))
        self.folder = self._files.folder
        self.model = model_from_hf(self._files.info.hf_config, f"{self.folder / INFO}: hf_config")
        self._files.check_model(self.model)
        self.sums = self._files.sums
        self._places: dict[str, tuple[Entry, Piece]] = {}
        self.tensors = {}
        for entry in table(self.model):
            for piece in entry.pieces:
                self._places[piece.hf_name] = (entry, piece)
                self.tensors[piece.hf_name] = TensorFacts(entry.hf_shape(piece), self._files.dtype(entry))
        self.config = self._config()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        entry, piece = self._places[name]
        parts = [self._files.rows(entry, a, b) for a, b in megatron_spans_between(piece, start, stop)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def read_into(self, name: str, start: int, stop: int, target: np.ndarray) -> None:
        entry, piece = self._places[name]
        row_bytes = len(target) // (stop - start)
        at = 0
        for first, last in megatron_spans_between(piece, start, stop):
            part = target[at : at + (last - first) * row_bytes]
            at += len(part)
            self._files.read_into(entry, first, last, part)
        assert at == len(target), (name, at, len(target))

    def dtypes(self) -> Mapping[str, torch.dtype]:
        return {entry.parameter: self._files.dtype(entry) for entry in table(self.model)}

    def carried(self) -> dict[str, bytes]:
        hf_files = self.folder / HF_FILES
        return for_window(read_carried(hf_files), self.model.max_position_embeddings, hf_files)

    def finish(self) -> None:
        self._files.finish()

    def check_files(self) -> str:
        if self.sums.sums is None:
            self._files.check_all()
            return "no SHA-256 here; CRC-32 of all tensors right"
        return super().check_files()

    def extra(self) -> Mapping[str, Any]:
        info = self._files.info
        return {
            "stage": info.stage,
            "step": info.step,
            "consumed_samples": info.consumed_samples,
            "versions": info.versions,
        }

    def close(self) -> None:
        self._files.close()

    def _config(self) -> dict[str, Any]:
        """The checkpoint's own config, with what only the original config knew (pad token, ...)."""
        self.sums.check(f"{HF_FILES}/{CONFIG}")
        path = self.folder / HF_FILES / CONFIG
        original = read_json(path, CheckpointError) if path.is_file() else {}
        original.pop("original_max_position_embeddings", None)  # lies in the rope dict of the checkpoint's config
        first = next(iter(self.tensors.values()))
        return with_dtype({**original, **self._files.info.hf_config}, dtype_name(first.dtype))


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
