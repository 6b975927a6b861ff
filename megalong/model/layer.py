"""One transformer layer: megatron-core's, with the recompute that `train.recompute` asks for and an MLP in tiles."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megalong.attention.kept import Kept
from megalong.config.schema import TrainConfig
from megalong.model.host import Host, Parked
from megalong.model.mlp import tiled_mlp
from megalong.model.recompute import Tensors, recomputed


class Layer(TransformerLayer):
    """Takes the place of `TransformerLayer` in the layer spec.

    Args:
        config .. submodules: as megatron-core's.
        train: how activations are kept.
        host: where they wait; None: on the device.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        train: TrainConfig,
        host: Host | None,
        **kwargs: Any,
    ) -> None:
        assert not config.hidden_dropout, "dropout is not supported: a recomputed layer would draw other numbers"
        super().__init__(config, submodules, layer_number, **kwargs)
        self._host, self._first_here = host, layer_number == 1
        self._recompute, self._mlp_chunk = train.recompute, train.mlp_chunk
        self._again = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """As megatron's; hidden_states [S, B, hidden], attention_mask: document starts, rotary_pos_emb: phases."""
        unknown = [name for name, value in rest.items() if value is not None]
        assert not unknown, f"a layer of long-context training is given {unknown}"
        given = (attention_mask, rotary_pos_emb)
        if self._recompute in ("full", "attention_kept") and torch.is_grad_enabled():
            return recomputed(self, self._recompute == "attention_kept", hidden_states, given), None
        return self.compute(hidden_states, None, given), None

    def compute(self, hidden_SBH: Tensor, kept: Kept | None, rest: tuple[Any, ...], again: bool = False) -> Tensor:
        """The layer once: `hidden_SBH` [S, B, hidden] to the same shape; `rest` as `forward` packs it."""
        attention_mask, rotary_pos_emb = rest
        self._again = again
        with self.self_attention.core_attention.keeping(kept):
            out, _ = super().forward(hidden_SBH, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        return out

    def park(self, tensors: Tensors) -> Parked | None:
        """As `recompute.Again` has it."""
        return self._host.park(tensors, self._first_here) if self._host is not None else None

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._mlp_chunk:
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        out = tiled_mlp(self.pre_mlp_layernorm, self.mlp, hidden_states, self._mlp_chunk, needed=not self._again)
        return self._forward_post_mlp((out, self.mlp.linear_fc2.bias), hidden_states)
