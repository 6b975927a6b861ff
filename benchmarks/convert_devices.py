"""What does each device of the converter's reading and writing gain? A conversion with some of them switched off.

`benchmarks/convert.py --trial` runs them against one another. With none of the writing devices, files are written
plainly: one thread, open().write, hashlib, fsync at the end.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

WRITING = ("direct", "hash_thread", "write_thread")
READING = ("give_back",)
DEVICES = (*WRITING, *READING)
TRIAL: dict[str, tuple[str, ...]] = {
    "plain": (),
    "all": DEVICES,
    **{f"all without {off}": tuple(on for on in DEVICES if on != off) for off in DEVICES},
    "all without threads": ("direct", *READING),
    "plain writing, reading with devices": READING,
}
"""Name -> devices that are on."""


class PlainFile:
    """Stands in for `OutputFile`: hashed and written in the caller's thread, through the page cache."""

    def __init__(self, folder: Any, name: str, size: int) -> None:
        self.name, self.size, self._folder = name, 0, folder
        self._hash = hashlib.sha256()
        path = folder.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self.size += len(view)
        self._folder._progress(len(view), self._folder._needed)
        self._hash.update(view)
        while view:
            view = view[self._file.write(view) :]

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._folder.sums[self.name] = {"bytes": self.size, "sha256": self._hash.hexdigest()}


def keep_only(on: tuple[str, ...]) -> None:
    """Switch all devices off but those of `on`, in this process."""
    from megalong.checkpoint.slices import SliceReader
    from megalong.convert import output_folder

    output: Any = output_folder.OutputFolder
    if "give_back" not in on:
        SliceReader._give_back = lambda *_: None  # type: ignore[method-assign]
    if not set(WRITING) & set(on):
        output.file = lambda folder, name, size: PlainFile(folder, name, size)
        return
    if "direct" not in on:
        output_folder._open_direct = lambda path: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def hashed(folder: Any, job: Any) -> None:
        job.file.hash.update(job.block[: job.count])
        if job.is_last:
            folder.sums[job.file.name] = {"bytes": job.file.size, "sha256": job.file.hash.hexdigest()}

    def written(folder: Any, job: Any) -> None:
        output_folder._write(job)
        folder._blocks.put(job.block)
        if job.is_last:
            folder._open.discard(job.file.handle)
            os.close(job.file.handle)

    def put(folder: Any, job: Any) -> None:  # hashed here; written here as well, or by the writing thread
        hashed(folder, job)
        folder._to_write.put(job) if "write_thread" in on else written(folder, job)

    def hash_and_write(folder: Any) -> None:  # both in the hashing thread
        while (job := folder._to_hash.get()) is not None:
            hashed(folder, job)
            written(folder, job)
        folder._to_write.put(None)

    if "hash_thread" not in on:
        output._put = put
    elif "write_thread" not in on:
        output._hash_jobs = hash_and_write
