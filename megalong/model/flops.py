"""Floating-point operations of a token and of an optimizer step, in closed form.

Two conventions, and every figure says which one it follows:

- **model FLOPs** (what MFU is a share of): the arithmetic that the mathematics asks for. Every weight of a matrix
  multiplication counts 2 forward and 4 backward; causal attention counts its visible half, twice in backward.
  Per token of a window L: `6 * P_matmul + 6 * layers * (H * D) * (L + 1)`. No recompute. (Chowdhery et al.,
  arXiv 2204.02311, appendix B; with the causal half, as FlashAttention's benchmarks count.)
- **hardware FLOPs** (what HFU is a share of): what is executed. Adds the forward pass that activation recompute runs
  again, the scores that the flash backward computes again (5 matrix products instead of 4; Dao, arXiv 2307.08691),
  and the logits that the chunked loss computes again.

Norms, rotary embedding, softmax and the optimizer are left out of both: they are bound by memory, not arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from megalong.config.schema import ModelConfig
from megalong.model.shape import layer_weights, output_layer


class Recompute(NamedTuple):
    """What a policy of activation recompute runs forward a second time."""

    layers: bool
    """Everything in a layer but its attention over the context."""
    attention: bool
    """The attention over the context: kernels, and the travel of keys and values."""


RECOMPUTE = {
    "none": Recompute(layers=False, attention=False),
    "selective": Recompute(layers=False, attention=True),
    "full": Recompute(layers=True, attention=True),
    "attention_kept": Recompute(layers=True, attention=False),
}
"""What `train.recompute` means."""


def extra_mlp_products(again: Recompute) -> int:
    """Products of a whole [hidden, intermediate] that an MLP in tiles (`mlp.py`) runs more than one in a piece.

    Backward computes gate and up projection again, tile by tile; the second forward pass of a recomputed layer leaves
    out all three.
    """
    return 2 - 3 * again.layers


@dataclass(frozen=True)
class MatmulWeights:
    """Weights that take part in matrix multiplications, counted over the whole model (elements)."""

    layer: int
    """One transformer layer: qkv, output projection, gate, up and down."""
    layers: int
    head: int
    """Output layer (also when its weight is tied to the embedding: the product is computed all the same)."""

    @property
    def total(self) -> int:
        return self.layer * self.layers + self.head


def matmul_weights(model: ModelConfig) -> MatmulWeights:
    """Matrix-multiplication weights of a Llama model; the embedding look-up multiplies nothing and is left out."""
    layer = sum(weight.numel for weight in layer_weights(model) if weight.columns)
    return MatmulWeights(layer, model.num_hidden_layers, output_layer(model).numel)


def attention_forward_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward attention FLOPs of all layers per token: 4*H*D per visible pair, (L+1)/2 visible keys on average."""
    width = model.num_attention_heads * model.head_dim
    return model.num_hidden_layers * 4 * width * (seq_length + 1) / 2


def model_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs per token in the MFU convention, for a causal window of `seq_length` tokens."""
    return 6 * matmul_weights(model).total + 3 * attention_forward_flops_per_token(model, seq_length)


def hardware_flops_per_token(
    model: ModelConfig, seq_length: int, recompute: str = "full", *, chunked_loss: bool = True, tiled_mlp: bool = False
) -> float:
    """Forward and backward FLOPs per token in the HFU convention.

    Args:
        recompute: a key of `RECOMPUTE`.
        chunked_loss: the logits are computed again in backward (`train.loss_chunk` > 0).
        tiled_mlp: the MLP is computed in tiles (`train.mlp_chunk` > 0).
    """
    again = RECOMPUTE[recompute]
    weights = matmul_weights(model)
    attention = attention_forward_flops_per_token(model, seq_length)
    flops = 6 * weights.total + 3.5 * attention
    if again.attention:
        flops += attention
    if again.layers:
        flops += 2 * weights.layer * weights.layers
    if tiled_mlp:
        flops += 2 * extra_mlp_products(again) * model.hidden_size * model.intermediate_size * weights.layers
    if chunked_loss:
        flops += 2 * weights.head
    return flops


def model_flops_per_step(model: ModelConfig, seq_length: int, global_batch_size: int) -> float:
    """Model FLOPs (MFU convention) of one optimizer step over all ranks."""
    return model_flops_per_token(model, seq_length) * seq_length * global_batch_size


def hardware_flops_per_step(
    model: ModelConfig, seq_length: int, global_batch_size: int, recompute: str = "full", **how: bool
) -> float:
    """Hardware FLOPs (HFU convention) of one optimizer step over all ranks; `how` as for a token."""
    per_token = hardware_flops_per_token(model, seq_length, recompute, **how)
    return per_token * seq_length * global_batch_size
