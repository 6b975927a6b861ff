"""A sample is tokens, and for each of them the slot in which its prediction counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOWHERE = -1


@dataclass(frozen=True)
class Sample:
    """One sequence, scored by teacher forcing: every token is predicted from the true ones before it."""

    tokens: Tensor
    """[n] int64."""
    slots: Tensor
    """[n] int64: the slot in which the prediction of this token counts, or NOWHERE. The first token has none."""

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.slots.shape, (self.tokens.shape, self.slots.shape)
        assert len(self.tokens) > 1
        assert int(self.slots[0]) == NOWHERE

    @staticmethod
    def of(prompt: Sequence[int], answers: Sequence[Sequence[int]], first_slot: int) -> Sample:
        """A prompt and what should follow it; answer i counts in slot first_slot + i.

        Args:
            answers: token ids; an empty prompt is not allowed.
        """
        assert prompt
        tokens, slots = list(prompt), [NOWHERE] * len(prompt)
        for i, answer in enumerate(answers):
            tokens += answer
            slots += [first_slot + i] * len(answer)
        return Sample(torch.tensor(tokens), torch.tensor(slots))


@dataclass(frozen=True)
class Slot:
    """What came of the tokens of one slot."""

    loss: float
    """Sum of cross-entropies, nats."""
    hits: int
    """Tokens that greedy decoding would have taken."""
    tokens: int
    last: int
    """Sum of the ids that greedy decoding would have taken: the id itself in a slot of one token."""

    @property
    def mean_loss(self) -> float:
        return self.loss / max(1, self.tokens)

    @property
    def exact(self) -> bool:
        """Whether greedy decoding, given what stands before, would have written all of it."""
        return self.tokens > 0 and self.hits == self.tokens
