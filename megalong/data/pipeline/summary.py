"""A data folder tells how it was made: settings, shares, lengths before and after, what was left out.

Nothing of it depends on where the folder lies or who made it, so that equal input and settings give equal bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from megalong.data.pipeline.choosing import Chosen
from megalong.data.pipeline.index import Index
from megalong.data.pipeline.job import Job
from megalong.data.pipeline.pieces import Stream
from megalong.data.pipeline.recall import SOURCE
from megalong.data.pipeline.tokenized import Tokenized, histogram

ELSEWHERE = ("out", "tokenized", "tokenizer")
"""Settings that say where things are."""


def made(
    job: Job,
    shards: list[Tokenized],
    index: Index,
    chosen: list[Chosen],
    held_out: Chosen,
    streams: dict[str, Stream],
    faults: Counter[str],
    examples: list[str],
) -> dict[str, Any]:
    """The `made` of a manifest."""
    settings = {k: v for k, v in dataclasses.asdict(job.settings).items() if k not in ELSEWHERE}
    names = [*index.sources, SOURCE]
    laid = np.zeros(len(names), np.int64)
    pieces = streams["train"].pieces
    np.add.at(laid, pieces["source"], pieces["length"])
    dropped: Counter[str] = Counter(index.totals.dropped)
    for shard in shards:
        dropped.update(shard.report.dropped)
    return {
        "stage": job.stage,
        "seed": job.seed,
        "settings": settings,
        "sources": names,
        "tokens": {name: int(n) for name, n in zip(names, laid, strict=True) if n},
        "parts": [
            {
                "part": str(c.group),
                "wanted": c.group.tokens,
                "tokens": c.tokens,
                "documents": sum(len(t.lengths) for t in c.taken),
                "cut": c.cut,
            }
            for c in chosen
        ],
        "held_out": {"tokens": held_out.tokens, "documents": sum(len(t.lengths) for t in held_out.taken)},
        "documents": {
            "read": sum(s.report.documents + sum(s.report.dropped.values()) for s in shards) + sum(faults.values()),
            "of_source": index.totals.documents,
            "dropped": dict(sorted(dropped.items())),
            "faults": dict(sorted(faults.items())),
            "examples": sorted(examples)[:20],
        },
        "lengths": {
            "before": index.totals.histograms,
            "after": _histograms(chosen, index.sources),
        },
    }


def _histograms(chosen: list[Chosen], sources: list[str]) -> dict[str, list[int]]:
    """Source -> documents by length as they are laid out, as in `tokenized.histogram`."""
    found: dict[int, list[np.ndarray]] = {number: [] for number in range(len(sources))}
    for taken in (t for c in chosen for t in c.taken):
        of_unit = np.zeros(len(taken.lengths), np.int64)
        of_unit[taken.owner] = taken.pieces["source"]
        for number in np.unique(of_unit).tolist():
            found[number].append(taken.lengths[of_unit == number])
    return {
        name: histogram(np.concatenate(found[number])) if found[number] else [] for number, name in enumerate(sources)
    }
