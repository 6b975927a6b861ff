"""Loss on real documents: by position, where far context is needed, and on short ones.

LongPPL (Fang et al., arXiv 2410.23771) averages the loss over key tokens: those that a long context makes likelier by
more than e**2 and likely at all (log probability above -2). Here a token's short context is what stands before it in a
piece of twice the base window, of which the second half is scored, so every token sees at least one base window. Which
tokens are key is decided by one model, the first that is evaluated, for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megalong.data.dataset import SequenceDataset
from megalong.data.texts import texts_of
from megalong.evaluation.position import LossByPosition, bucket_edges
from megalong.evaluation.sample import NOWHERE, Sample, Slot
from megalong.evaluation.tokens import PromptTokenizer
from megalong.runtime.errors import DataError

ALPHA, BETA = 2.0, -2.0  # the paper's: gain and log probability of a key token
PIECES = 16
"""Short texts of one sequence: 131,072 tokens of a base window of 8,192, a small part of a pass over a long one."""
_DATA_FOLDER = "manifest.json"


def long_documents(source: Path, tokenizer: PromptTokenizer | None, tokens: int, count: int) -> list[Tensor]:
    """Up to `count` documents, each cut to its first `tokens` tokens, [tokens] int64.

    Args:
        source: text or .jsonl files, or a data folder of tools/prepare_data.py (its held-out documents).
        tokenizer: for text.

    Raises:
        DataError: no document is as long as that; the text says how long they are.
    """
    longest, seen, found = 0, 0, []
    for document in _documents(source, tokenizer):
        seen, longest = seen + 1, max(longest, len(document))
        if len(document) >= tokens:
            found.append(document[:tokens])
            if len(found) == count:
                break
    if not found:
        raise DataError(
            f"{source}: none of {seen:,} documents has {tokens:,} tokens (the longest has {longest:,}). Give longer "
            "documents, or a shorter window with --window."
        )
    return found


def short_pieces(data: SequenceDataset, sequences: int, window: int) -> list[Tensor]:
    """Text for the loss at short context, out of sequences spread over the data: pieces of window + 1 tokens inside one
    document, at most PIECES of a sequence; its whole documents where all are shorter.

    Returns:
        [tokens] int64 each, at least two.
    """
    found, count = [], min(sequences, len(data))
    for sequence in (i * len(data) // count for i in range(count)):
        ends = [*data.document_starts(sequence).tolist(), data.valid_length(sequence)]
        documents = [(a, b) for a, b in pairwise(ends) if b - a > 1]
        pieces = [(at, at + window + 1) for a, b in documents for at in range(a, b - window, window)] or documents
        some = min(PIECES, len(pieces))
        for start, stop in (pieces[i * len(pieces) // some] for i in range(some)):
            found.append(torch.from_numpy(data.read(sequence, start, stop)).long())
    return found


def _documents(source: Path, tokenizer: PromptTokenizer | None) -> Iterator[Tensor]:
    if (source / _DATA_FOLDER).is_file():
        data = SequenceDataset(source, "eval")
        for i in range(len(data)):
            valid = data.valid_length(i)
            tokens = torch.from_numpy(data.read(i, 0, valid)).long()
            ends = [*data.document_starts(i).tolist(), valid]
            yield from (tokens[a:b] for a, b in pairwise(ends) if b > a)
        return
    assert tokenizer is not None
    for text in texts_of(source).read():
        if ids := tokenizer.encode(text):
            yield torch.tensor([*tokenizer.beginning, *ids])


def position_samples(documents: Sequence[Tensor], edges: Sequence[int]) -> list[Sample]:
    """The predictions of each document by bucket of their position; slot i is bucket i."""
    found = []
    for tokens in documents:
        inner = torch.tensor(edges[1:-1])
        slots = torch.bucketize(torch.arange(-1, len(tokens) - 1), inner, right=True)
        slots[0] = NOWHERE
        found.append(Sample(tokens, slots))
    return found


def loss_by_position(slots: Sequence[Slot], edges: Sequence[int]) -> LossByPosition:
    """From the slots of `position_samples`."""
    sums = torch.tensor([[s.loss for s in slots], [float(s.tokens) for s in slots]])
    return LossByPosition.from_sums(sums, list(edges))


def short_samples(documents: Sequence[Tensor]) -> list[Sample]:
    """All predictions of each document in one slot, 0."""
    found = []
    for tokens in documents:
        slots = torch.zeros(len(tokens), dtype=torch.int64)
        slots[0] = NOWHERE
        found.append(Sample(tokens, slots))
    return found


def per_token_samples(documents: Sequence[Tensor]) -> tuple[list[Sample], int]:
    """A slot for every token of every document; the slot of token i of document d is d * length + i."""
    found = []
    for d, tokens in enumerate(documents):
        slots = torch.arange(len(tokens)) + d * len(tokens)
        slots[0] = NOWHERE
        found.append(Sample(tokens, slots))
    return found, sum(map(len, documents))


def short_context_samples(documents: Sequence[Tensor], base_window: int) -> list[Sample]:
    """The same slots, every token behind the first 2 * base_window with at least base_window tokens before it."""
    found = []
    for d, tokens in enumerate(documents):
        for start in range(base_window, len(tokens) - base_window, base_window):
            piece = tokens[start : start + 2 * base_window]
            slots = torch.arange(start, start + len(piece)) + d * len(tokens)
            slots[:base_window] = NOWHERE
            found.append(Sample(piece, slots))
    return found


@dataclass(frozen=True)
class LongLoss:
    """Loss on tokens that need far context."""

    loss: float | None
    """Nats per key token; None where there is none."""
    key_tokens: int
    of: int
    """Tokens that were compared."""


def key_tokens(long: Sequence[Slot], short: Sequence[Slot]) -> list[int]:
    """Slots whose token far context makes likelier by more than ALPHA nats, and likelier than BETA."""
    return [
        i
        for i, (a, b) in enumerate(zip(long, short, strict=True))
        if a.tokens and b.tokens and b.loss - a.loss > ALPHA and -a.loss > BETA
    ]


def long_loss(long: Sequence[Slot], keys: Sequence[int], compared: int) -> LongLoss:
    """The mean loss of a model over the key tokens."""
    total = math.fsum(long[i].loss for i in keys)
    return LongLoss(total / len(keys) if keys else None, len(keys), compared)


def edges_of(window: int) -> list[int]:
    """Buckets of the loss by position."""
    return bucket_edges(window)
