"""Rotary phases for this rank's positions only.

megatron-core's `RotaryEmbedding` builds the whole fp32 table [L, 1, 1, D] on every rank before slicing (512 MiB at a
million tokens). This module stands in its place and builds [S, 1, 1, D] for the local positions, once. Phases are
fp32, position times inverse frequency in the order in which transformers computes them: what is trained is then
exactly what is served. Where functions are compiled (`runtime/fused.py`), the table holds cosines and sines: computed
once, and by torch, whose own are exact at a phase of a million radians.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megalong.attention.zigzag import local_positions
from megalong.runtime import device


class LocalRotaryEmbedding(nn.Module):
    """Takes the place of `GPTModel.rotary_pos_emb`.

    Args:
        inv_freq: [D/2] fp32, radians per token.
        seq_length: window, tokens.
        cp_size: context-parallel ranks over which the window is cut.
        cp_rank: this rank's place among them.
        turns: dtype of queries and keys, where cosines and sines are wanted; None: phases.
    """

    def __init__(
        self, inv_freq: Tensor, seq_length: int, cp_size: int, cp_rank: int, turns: torch.dtype | None = None
    ) -> None:
        super().__init__()
        assert inv_freq.dtype == torch.float32
        # neither parameter nor buffer: module.bfloat16() must not round it
        self._inv_freq = inv_freq
        self._shape, self._turns = (seq_length, cp_size, cp_rank), turns
        self._table: Tensor | None = None

    @contextmanager
    def at_length(self, seq_length: int, inv_freq: Tensor) -> Iterator[None]:
        """Within the block, phases of sequences of another length, by other frequencies.

        Args:
            seq_length: tokens, a multiple of 2 * cp.
            inv_freq: [D/2] fp32, radians per token.
        """
        before = self._inv_freq, self._shape, self._table
        self._inv_freq, self._shape, self._table = inv_freq, (seq_length, *self._shape[1:]), None
        try:
            yield
        finally:
            self._inv_freq, self._shape, self._table = before

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        """Window in tokens; megatron asks for it and hands it back to `forward`."""
        return self._shape[0]

    def forward(self, max_seq_len: int, packed_seq: bool = False, cp_group: Any = None, **_: Any) -> Tensor:
        """Phases [S, 1, 1, D] fp32 of the local positions, each half of D holding the same D/2 phases; or their cosines
        and sines, [2, S, 1, 1, D]."""
        assert max_seq_len == self._shape[0], (max_seq_len, self._shape)
        if self._table is None:
            positions = local_positions(*self._shape).to(device.device(), torch.float32)
            phases = positions[:, None] * self._inv_freq.to(positions.device)[None, :]
            table = torch.cat((phases, phases), dim=-1)[:, None, None, :]
            if self._turns is not None:
                table = torch.stack((table.cos().to(self._turns), table.sin().to(self._turns)))
            self._table = table
        return self._table
