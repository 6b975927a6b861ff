"""Which weights does a Llama have? The one list: names, shapes, Hugging Face's tensors and the axis that is cut.

Integers only. The converter's table of rows (`convert/table.py`), the planner's parameters of a rank
(`planning/parameters.py`) and the FLOP counts are derived from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalong.config.schema import ModelConfig

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"


@dataclass(frozen=True)
class Weight:
    """One tensor of megatron-core, made of the rows of one or more Hugging Face tensors."""

    name: str
    """As the local layer spec calls it; inside the layer, if it is a layer's."""
    parts: tuple[tuple[str, int], ...]
    """Hugging Face tensors and their rows; names inside the layer, if it is a layer's."""
    columns: tuple[int, ...] = ()
    """Of all its parts; none: a vector."""
    tp_axis: int | None = None
    """Axis that tensor parallelism cuts; None: every rank has all of it."""
    groups: int = 1
    """The rows of each part are cut in so many groups, and the parts take turns group by group."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(rows for _, rows in self.parts), *self.columns)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def gated(self) -> bool:
        """Gate over up: tensor parallelism cuts each of the two by itself."""
        return len(self.parts) == 2


def layer_weights(model: ModelConfig) -> list[Weight]:
    """Weights of one transformer layer, in the order of the forward pass."""
    hidden, wide = model.hidden_size, model.intermediate_size
    groups, width = model.num_key_value_heads, model.num_attention_heads * model.head_dim
    kv_width = groups * model.head_dim

    def norm(name: str, hf_name: str) -> list[Weight]:
        return [Weight(f"{name}.weight", ((f"{hf_name}.weight", hidden),))]

    def column(name: str, parts: tuple[tuple[str, int], ...], bias: bool, groups: int = 1) -> list[Weight]:
        return [
            Weight(
                f"{name}.{kind}",
                tuple((f"{part}_proj.{kind}", rows) for part, rows in parts),
                (hidden,) if kind == "weight" else (),
                tp_axis=0,
                groups=groups,
            )
            for kind in ("weight", "bias")[: 1 + bias]
        ]

    def row(name: str, hf_name: str, inner: int, bias: bool) -> list[Weight]:
        found = [Weight(f"{name}.weight", ((f"{hf_name}.weight", hidden),), (inner,), tp_axis=1)]
        return [*found, Weight(f"{name}.bias", ((f"{hf_name}.bias", hidden),))] if bias else found

    attention = (("self_attn.q", width), ("self_attn.k", kv_width), ("self_attn.v", kv_width))
    return [
        *norm("input_layernorm", "input_layernorm"),
        *column("self_attention.linear_qkv", attention, model.attention_bias, groups),
        *row("self_attention.linear_proj", "self_attn.o_proj", width, model.attention_bias),
        *norm("pre_mlp_layernorm", "post_attention_layernorm"),
        *column("mlp.linear_fc1", (("mlp.gate", wide), ("mlp.up", wide)), model.mlp_bias),
        *row("mlp.linear_fc2", "mlp.down_proj", wide, model.mlp_bias),
    ]


def embedding(model: ModelConfig) -> Weight:
    """The table of token vectors, without padding rows."""
    return Weight(EMBEDDING, (("model.embed_tokens.weight", model.vocab_size),), (model.hidden_size,), tp_axis=0)


def final_norm(model: ModelConfig) -> Weight:
    return Weight(FINAL_NORM, (("model.norm.weight", model.hidden_size),))


def output_layer(model: ModelConfig) -> Weight:
    """The output layer, without padding rows; a model with tied embeddings has the embedding in its place."""
    return Weight(OUTPUT, (("lm_head.weight", model.vocab_size),), (model.hidden_size,), tp_axis=0)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as tensor parallelism cuts it: the next multiple of tp."""
    return math.ceil(vocab_size / tp) * tp
