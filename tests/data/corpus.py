"""Real text as SlimPajama has it: shards of .jsonl.zst whose documents name their source; and jobs on them."""

from __future__ import annotations

import gzip
import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megalong.data.builtin import python_sources, train_tokenizer
from megalong.data.dataset import SequenceDataset
from megalong.data.pipeline.job import Job
from megalong.data.pipeline.settings import Settings

SOURCES = ("RedPajamaBook", "RedPajamaC4", "RedPajamaGithub")
WINDOW = 64
SOURCE_KEY = "meta.redpajama_set_name"


def texts(count: int = 240) -> list[str]:
    """Distinct texts of 40 to 6,000 characters."""
    whole = "".join(t for _, t in zip(range(8), python_sources(10**6), strict=False))
    found, at = [], 0
    for i in range(count):
        size = 40 + (i * i * 37) % 900 + (6000 if i % 12 == 0 else 0)
        found.append(whole[at : at + size])
        at += size
    assert len({*found}) == count
    return found


def record(text: str, source: str, **meta: Any) -> dict[str, Any]:
    """A document as SlimPajama has it."""
    return {"text": text, "meta": {"redpajama_set_name": source, **meta}}


def records(of: list[str]) -> list[dict[str, Any]]:
    """Texts, each of one of three sources, in repositories of five."""
    return [record(t, SOURCES[i * 7 % 10 % 3], repo=f"repo{i // 5}") for i, t in enumerate(of)]


def write_lines(path: Path, documents: list[dict[str, Any]]) -> Path:
    """A .jsonl, .jsonl.gz or .jsonl.zst."""
    raw = "".join(json.dumps(d) + "\n" for d in documents).encode()
    if path.suffix == ".zst":
        raw = zstandard.compress(raw)
    elif path.suffix == ".gz":
        raw = gzip.compress(raw, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


def make_shards(folder: Path, documents: list[dict[str, Any]], shards: int = 5) -> Path:
    """Shards of .jsonl.zst in the order of the documents."""
    size = -(-len(documents) // shards)
    for i in range(shards):
        write_lines(folder / f"chunk_{i:03}.jsonl.zst", documents[i * size : (i + 1) * size])
    return folder


def make_tokenizer(folder: Path, of: list[str]) -> Path:
    """A byte-level tokenizer of 400 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(of, 400, folder)
    return folder


def job(source: Path, out: Path, tokenizer: Path, *, workers: int = 1, sequences: int = 100, **settings: Any) -> Job:
    """A job for a window of 64 tokens; what is not said is as it is by default, with a tenth held out."""
    said = {"source_key": SOURCE_KEY, "eval_fraction": 0.1, "tokenized": str(out.parent / "tokenized")} | settings
    return Job(
        settings=Settings(source=str(source), out=str(out), **said),
        tokenizer=tokenizer,
        stage="test",
        seq_length=WINDOW,
        sequences=sequences,
        seed=7,
        workers=workers,
    )


def digests(folder: Path) -> dict[str, str]:
    """Name -> hash of every file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def stream(folder: Path, split: str = "train") -> tuple[np.ndarray, list[int]]:
    """The tokens of a split as one stream (each token once), and where documents start in it."""
    dataset = SequenceDataset(folder, split)
    tokens, starts = [dataset.read(0, 0, 1)], {0}
    for i in range(len(dataset)):
        tokens.append(dataset.read(i, 1, dataset.valid_length(i)) if dataset.valid_length(i) > 1 else tokens[0][:0])
        fresh = dataset.document_starts(i).tolist()
        starts |= {i * dataset.seq_length + s for s in fresh if s}
    return np.concatenate(tokens), sorted(starts)


def documents_in(folder: Path, split: str = "train") -> list[list[int]]:
    """Token ids of each document of a split, in order."""
    tokens, starts = stream(folder, split)
    return [tokens[a:b].tolist() for a, b in pairwise([*starts, len(tokens)])]
