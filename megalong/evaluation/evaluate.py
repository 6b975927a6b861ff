"""The scores of one checkpoint: its questions, its documents and its short texts, gathered in one record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megalong.evaluation.documents import (
    edges_of,
    key_tokens,
    long_loss,
    loss_by_position,
    per_token_samples,
    position_samples,
    short_context_samples,
    short_samples,
)
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.sample import NOWHERE, Sample, Slot
from megalong.evaluation.score import score
from megalong.evaluation.scores import Evaluation
from megalong.evaluation.suite import Suite, results
from megalong.run import Run


@dataclass(frozen=True)
class Material:
    """What every checkpoint is asked, the same for all."""

    suite: Suite
    documents: list[Tensor] = field(default_factory=list)
    """As long as the window and one more, [window + 1]."""
    short: list[Tensor] = field(default_factory=list)
    """At most the base window, [tokens]."""
    base_window: int = 0
    """Tokens of short context that decide which tokens need a long one; 0: not asked."""


def material_samples(material: Material) -> list[Sample]:
    """All samples that `evaluate_model` scores, for a progress bar."""
    found = list(material.suite.samples) + short_samples(material.short)
    if material.documents:
        found += per_token_samples(material.documents)[0]
        if material.base_window:
            found += short_context_samples(material.documents, material.base_window)
    return found


def evaluate_model(
    run: Run,
    model: Sequence[torch.nn.Module],
    material: Material,
    name: str,
    keys: list[int] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Evaluation, list[int] | None]:
    """Score a model on all ranks of its layout.

    Args:
        keys: the key tokens that an earlier model has chosen. None: this one chooses.

    Returns:
        the evaluation, the same on every rank, and the key tokens.
    """
    # one pass over everything: positions and key tokens come from the same slots, one per token
    tokens, count = per_token_samples(material.documents)
    compared = short_context_samples(material.documents, material.base_window) if material.base_window else []
    first, second = material.suite.slots, material.suite.slots + 1
    parts = [
        *material.suite.samples,
        *_shifted(short_samples(material.short), first),
        *_shifted(tokens, second),
        *_shifted(compared, second + count),
    ]
    slots = score(run, model, parts, second + 2 * count, progress)
    long, short = slots[second : second + count], slots[second + count :]
    if keys is None and compared:
        keys = key_tokens(long, short)
    compared_tokens = sum(1 for s in short if s.tokens)
    position = _position(material.documents, long) if tokens else None
    mean = _mean_loss(long) if tokens else None
    return (
        Evaluation(
            name=name,
            window=run.seq_length,
            theta=run.theta,
            cells=results(material.suite, slots[:first]),
            position=position,
            perplexity=math.exp(min(mean, 700.0)) if mean is not None else None,
            long=long_loss(long, keys, compared_tokens) if keys is not None and compared else None,
            short_loss=slots[first].mean_loss if material.short else None,
        ),
        keys,
    )


def _shifted(samples: Sequence[Sample], by: int) -> list[Sample]:
    return [replace(s, slots=torch.where(s.slots == NOWHERE, s.slots, s.slots + by)) for s in samples]


def _position(documents: Sequence[Tensor], per_token: Sequence[Slot]) -> LossByPosition:
    edges = edges_of(len(documents[0]) - 1)
    sums = [Slot(0.0, 0, 0, 0)] * (len(edges) - 1)
    for sample, start in zip(
        position_samples(documents, edges), range(0, len(per_token), len(documents[0])), strict=True
    ):
        for i, bucket in enumerate(sample.slots.tolist()):
            if bucket != NOWHERE:
                a, b = sums[bucket], per_token[start + i]
                sums[bucket] = Slot(a.loss + b.loss, a.hits + b.hits, a.tokens + b.tokens, 0)
    return loss_by_position(sums, edges)


def _mean_loss(slots: Sequence[Slot]) -> float:
    return math.fsum(s.loss for s in slots) / max(1, sum(s.tokens for s in slots))
