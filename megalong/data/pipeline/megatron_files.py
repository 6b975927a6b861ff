"""Documents of what Megatron-LM's preprocess_data.py wrote: `.idx` says where each lies in `.bin`.

Layout of `.idx` (megatron/core/datasets/indexed_dataset.py): 9 bytes of magic, uint64 version 1, uint8 code of the
token type, uint64 sequences, uint64 documents + 1, then int32 lengths, int64 byte offsets, int64 document bounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from megalong.data.pipeline.documents import Document
from megalong.data.pipeline.faults import CUT, Fault
from megalong.runtime.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
TYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def read_megatron(path: Path, vocab_size: int, eos_token_id: int, limit: int) -> Iterator[Document | Fault]:
    """The documents of a `.bin` with its `.idx`, without their last end-of-text token.

    Args:
        path: the `.bin`.
        vocab_size: ids at and above it are another tokenizer's.
        limit: tokens of a document at most.

    Raises:
        DataError: the `.idx` is not one that megatron writes.
        OSError: a file cannot be read.
    """
    lengths, offsets, bounds, kind = _index(path.with_suffix(".idx"))
    end = path.stat().st_size
    width = np.dtype(kind).itemsize
    with path.open("rb") as tokens:
        for number, (first, last) in enumerate(pairwise(bounds)):
            where = f"{path}, document {number}"
            if int(lengths[first:last].sum()) > limit:
                yield Fault("too_large", where)
                continue
            parts = []
            for i in range(int(first), int(last)):
                start, size = int(offsets[i]), int(lengths[i]) * width
                if start < 0 or start + size > end:
                    yield Fault(CUT, f"{where}: it lies beyond the end of the file")
                    return
                tokens.seek(start)
                parts.append(np.frombuffer(tokens.read(size), np.dtype(kind).newbyteorder("<")))
            ids = np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                yield Fault("bad_ids", where)
                continue
            if len(ids) and ids[-1] == eos_token_id:
                ids = ids[:-1]
            yield Document(ids.astype(np.uint32), None, None)


def _index(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, type]:
    try:
        raw = np.memmap(path, np.uint8, "r")
        magic, version, code, sequences, documents = HEAD.unpack(raw[: HEAD.size].tobytes())
        if magic != MAGIC or version != 1 or code not in TYPES:
            raise ValueError(f"magic {magic!r}, version {version}, token type {code}")
        sizes = (4 * sequences, 8 * sequences, 8 * documents)
        ends = HEAD.size + np.cumsum(sizes)
        if documents < 1 or ends[-1] > len(raw):
            raise ValueError(f"{len(raw):,} bytes for {sequences:,} sequences and {documents:,} document bounds")
        lengths = raw[HEAD.size : ends[0]].view("<i4")
        offsets, bounds = raw[ends[0] : ends[1]].view("<i8"), raw[ends[1] : ends[2]].view("<i8")
        if (lengths < 0).any() or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
            raise ValueError("lengths or document bounds that make no sense")
    except (ValueError, struct.error, FileNotFoundError) as error:
        raise DataError(f"{path} is not the .idx of a megatron .bin ({' '.join(str(error).split())[:200]}).") from error
    return lengths, offsets, bounds, TYPES[code]
