"""A layer spec of Transformer Engine's shape, made of parts that need no Transformer Engine: norms inside linears."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megalong.attention.core import CoreAttention
from megalong.config.schema import AttentionConfig, ModelConfig, TrainConfig
from megalong.model.norm import RMSNorm
from megalong.model.spec import BiasedColumnParallelLinear, BiasedRowParallelLinear


class NormedColumnParallelLinear(ColumnParallelLinear):
    """Stands where TELayerNormColumnParallelLinear stands, with its parameter names."""

    def __init__(self, input_size: int, *args: Any, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))
        self.eps = config.layernorm_epsilon

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return super().forward(normed * self.layer_norm_weight, *args, **kwargs)


class NormedBiasedColumnParallelLinear(NormedColumnParallelLinear, BiasedColumnParallelLinear):
    """With a bias."""


def block_spec(
    model: ModelConfig, attention: AttentionConfig, train: TrainConfig, config: Any, norm: type
) -> TransformerBlockSubmodules:
    """Layers whose state dict has the names of Transformer Engine's spec."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=NormedBiasedColumnParallelLinear if model.attention_bias else NormedColumnParallelLinear,
                    core_attention=partial(CoreAttention, attention=attention),
                    linear_proj=BiasedRowParallelLinear if model.attention_bias else RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=NormedColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)
