"""How does a running training reach the disk, whole or not at all? Written aside, synced, renamed, then pointed to.

A save goes to `step_00000010.partial`: sharded model and optimizer (any later TP, PP, CP, DP can load them), the
common state (step, cursor; random generators are a function of the step), `config.yaml`, `megalong.json` and
`checksums.json`. When all ranks have written, everything is synced, the folder is renamed, and only then does `latest`
point to it.

Beside the training (the default on CUDA): what the ranks hold is copied to host memory, a thread writes the copy, and
the commit follows after a later step, once all ranks have written. Otherwise the training waits.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megalong.checkpoint import pointer, threads
from megalong.checkpoint.checksums import write_checksums
from megalong.checkpoint.info import HF_FILES, CheckpointInfo, write_info
from megalong.checkpoint.load import make_moments, metadata, module_of
from megalong.checkpoint.optimizer_shards import part_of, sharded_tensors
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import commit_folder, fresh_folder, partial_of, sha256_of, write_text
from megalong.runtime.launch import together

PROBE_BYTES = 2**20  # written before anything else: a quota or a read-only mount shows only when one writes


@dataclass(frozen=True)
class Contents:
    """What goes into a checkpoint besides the tensors."""

    state: dict[str, Any]
    """Plain values that are the same on every rank (cursor, counters)."""
    info: CheckpointInfo
    config_yaml: str
    carried: Mapping[str, bytes]
    """Tokenizer and generation files that travel along to the next Hugging Face export, name -> content. They are held
    in memory: the checkpoint that they came from may be pruned."""


class Saving:
    """One checkpoint on its way to disk. Every rank makes one, and later calls `commit`.

    Args:
        root: `run_dir/checkpoints`.
        expected_bytes: room that must be free.
        beside: copy now and write in a thread, instead of writing now.

    Raises:
        CheckpointError: the disk is full or cannot be written; on every rank, and nothing is left behind.
    """

    def __init__(
        self,
        root: Path,
        step: int,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        record: Contents,
        *,
        expected_bytes: int = 0,
        beside: bool = False,
    ) -> None:
        self.root, self.step, self.record, self.beside = root, step, record, beside
        self.begun = time.monotonic()
        self.target = pointer.folder_of(root, step)
        self.partial = partial_of(self.target)
        self.first = dist.get_rank() == 0
        self._error: Exception | None = None
        self._sums: dict[str, dict[str, Any]] = {}
        self._on_disk(lambda: self._prepare(expected_bytes))
        make_moments(optimizer)  # there are none if no step has been taken, or none that was finite
        sharded_model = module_of(model).sharded_state_dict(metadata=metadata())
        tensors = sharded_tensors(optimizer, sharded_model, loading=False)
        everything = {
            "model": sharded_model,
            "optimizer": {"common": part_of(optimizer).state_dict(), "tensors": tensors},
            "state": {**record.state, "step": step},
        }
        with threads.in_process():
            self._request = dist_checkpointing.save(
                everything, str(self.partial), content_metadata=metadata(), async_sharded_save=True
            )
        self._arguments = threads.staged(self._request, module_of(model).parameters() if beside else ())
        self._thread = threading.Thread(target=self._write, name="save", daemon=True) if beside else None
        if self._thread is None:
            self._write()
        else:
            self._thread.start()

    @property
    def written(self) -> bool:
        """Whether this rank has written its part (or failed to)."""
        return self._thread is None or not self._thread.is_alive()

    def commit(self) -> int:
        """Wait for all ranks and make the checkpoint the newest one.

        Returns:
            bytes of the checkpoint.

        Raises:
            CheckpointError: a rank could not write; the newest checkpoint is the one before.
        """
        if self._thread is not None:
            self._thread.join()
        self._on_disk(self._raise)
        for finalize in self._request.finalize_fns:
            finalize()
        self._arguments = []
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._sums)
        sums = {name: entry for part in gathered for name, entry in part.items()}
        return self._on_disk(lambda: self._seal(sums))

    def _on_disk(self, work: Callable[[], int]) -> int:
        """Do something with the disk; an OSError on one rank becomes one CheckpointError on all."""

        def guarded() -> int:
            try:
                return work()
            except OSError as error:
                before = pointer.newest(self.root)
                raise CheckpointError(
                    f"step {self.step} cannot be saved in {self.root}: {error.strerror or error}. The newest whole "
                    f"checkpoint is {before.name if before else 'none'}. Make room or give the run_dir write access, "
                    "and start again."
                ) from error

        try:
            return together(guarded)
        except CheckpointError:
            if self.first:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _prepare(self, expected_bytes: int) -> int:
        if self.first:
            fresh_folder(self.partial)
            free = shutil.disk_usage(self.partial).free
            if free < expected_bytes:
                raise OSError(f"{expected_bytes / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")
            probe = self.partial / "probe"
            probe.write_bytes(bytes(PROBE_BYTES))
            probe.unlink()
            if self.target.exists():  # the same step again, after a resume from an older one
                shutil.rmtree(self.target)
        return 0

    def _write(self) -> None:
        """This rank's files and their checksums."""
        try:
            if self._request.async_fn is not None:
                self._request.async_fn(*self._arguments)
            self._sums = _sums(self.partial, list(self.partial.glob(f"__{dist.get_rank()}_*")))
        except Exception as error:  # told to all ranks in `commit`
            self._error = error

    def _raise(self) -> int:
        if self._error is not None:
            cause = self._error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
            raise cause or self._error
        return 0

    def _seal(self, sums: dict[str, dict[str, Any]]) -> int:
        if not self.first:
            return 0
        record = self.record
        write_text(self.partial / "config.yaml", record.config_yaml)
        write_info(self.partial, record.info)
        for name, content in record.carried.items():
            (self.partial / HF_FILES).mkdir(exist_ok=True)
            (self.partial / HF_FILES / name).write_bytes(content)
        rest = [
            p for p in self.partial.rglob("*") if p.is_file() and p.relative_to(self.partial).as_posix() not in sums
        ]
        sums |= _sums(self.partial, rest)
        write_checksums(self.partial, sums)
        commit_folder(self.partial, self.target)
        pointer.point_to(self.root, self.target)
        return sum(entry["bytes"] for entry in sums.values())


def _sums(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    }
