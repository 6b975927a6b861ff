"""Which modules does one transformer layer consist of? megatron-core's linears and MLP, our norm and core attention.

Hugging Face Llama configurations switch attention biases and MLP biases separately; megatron-core has one switch for
both. The linears below carry the choice, and the config's own switch stays off.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor
from torch.nn import Module

from megalong.attention.core import CoreAttention
from megalong.config.schema import AttentionConfig, ModelConfig, TrainConfig
from megalong.model.elementwise import FusedRotation
from megalong.model.host import Host
from megalong.model.layer import Layer
from megalong.model.mlp import FusedMLP
from megalong.model.norm import RMSNorm
from megalong.runtime import fused, packages
from megalong.runtime.errors import ConfigError


class BiasedColumnParallelLinear(ColumnParallelLinear):
    """Column-parallel linear with a bias, whatever the config's `add_bias_linear` says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class BiasedRowParallelLinear(RowParallelLinear):
    """Row-parallel linear with a bias, whatever the config's `add_bias_linear` says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "bias": True})


class FusedSelfAttention(SelfAttention):
    """megatron-core's self-attention with one kernel to rotate queries, and one for keys, where functions are compiled
    (`runtime/fused.py`). `rotary_pos_emb` is then what `LocalRotaryEmbedding` gives with `turns`."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._table = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        finally:
            del self._table

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return FusedRotation.apply(query, self._table), FusedRotation.apply(key, self._table), value


def _attention_class() -> type[SelfAttention]:
    return FusedSelfAttention if fused.in_use() else SelfAttention


def _mlp_class() -> type[MLP]:
    return FusedMLP if fused.in_use() else MLP


def block_spec(
    model: ModelConfig,
    attention: AttentionConfig,
    train: TrainConfig,
    config: TransformerConfig,
    norm: type[Module] = RMSNorm,
) -> Any:
    """Layer spec for the attention backend.

    Args:
        norm: class of the norms, where they are not Transformer Engine's (`model.norm.norm_class`).

    Raises:
        ConfigError: backend transformer_engine where Transformer Engine is not installed.
    """
    if attention.backend == "transformer_engine":
        return _transformer_engine_spec(model, config)
    return TransformerBlockSubmodules(
        layer_specs=[_local_layer(model, attention, train, norm)] * _layers_here(config), layer_norm=norm
    )


def _layers_here(config: TransformerConfig) -> int:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    return get_num_layers_to_build(config)


def _local_layer(model: ModelConfig, attention: AttentionConfig, train: TrainConfig, norm: type[Module]) -> ModuleSpec:
    host = Host() if train.keep_on == "host" else None
    column = BiasedColumnParallelLinear if model.attention_bias else ColumnParallelLinear
    row = BiasedRowParallelLinear if model.attention_bias else RowParallelLinear
    fc1 = BiasedColumnParallelLinear if model.mlp_bias else ColumnParallelLinear
    fc2 = BiasedRowParallelLinear if model.mlp_bias else RowParallelLinear
    return ModuleSpec(
        module=Layer,
        params={"train": train, "host": host},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=_attention_class(),
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=partial(CoreAttention, attention=attention),
                    linear_proj=row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=_mlp_class(), submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=fc2)),
            mlp_bda=get_bias_dropout_add,
            # On disk the norms carry the names of the Transformer Engine spec, so either spec loads the other's files.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _transformer_engine_spec(model: ModelConfig, config: TransformerConfig) -> Any:
    packages.require(packages.TRANSFORMER_ENGINE, "attention.backend=transformer_engine", "attention.backend=megalong")
    if model.attention_bias != model.mlp_bias:
        raise ConfigError("attention.backend=transformer_engine cannot bias attention and MLP separately.")
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm")
    for layer in block.layer_specs:
        layer.submodules.self_attention.module = _attention_class()
        layer.submodules.mlp.module = _mlp_class()
    return block
