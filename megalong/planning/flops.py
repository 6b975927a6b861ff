"""How many floating-point operations does a token, or an optimizer step, take?

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

from megalong.config.schema import ModelConfig

RECOMPUTE_POLICIES = ("none", "selective", "full")


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
    width = model.num_attention_heads * model.head_dim
    kv_width = model.num_key_value_heads * model.head_dim
    attention = model.hidden_size * (width + 2 * kv_width) + width * model.hidden_size
    mlp = 3 * model.hidden_size * model.intermediate_size
    return MatmulWeights(attention + mlp, model.num_hidden_layers, model.hidden_size * model.vocab_size)


def attention_forward_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward attention FLOPs of all layers per token: 4*H*D per visible pair, (L+1)/2 visible keys on average."""
    width = model.num_attention_heads * model.head_dim
    return model.num_hidden_layers * 4 * width * (seq_length + 1) / 2


def model_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs per token in the MFU convention, for a causal window of `seq_length` tokens."""
    return 6 * matmul_weights(model).total + 3 * attention_forward_flops_per_token(model, seq_length)


def hardware_flops_per_token(
    model: ModelConfig, seq_length: int, recompute: str = "full", *, chunked_loss: bool = True
) -> float:
    """Forward and backward FLOPs per token in the HFU convention.

    Args:
        recompute: `none`, `selective` (attention again) or `full` (every layer's forward again).
        chunked_loss: the logits are computed again in backward (`train.loss_chunk` > 0).
    """
    assert recompute in RECOMPUTE_POLICIES, recompute
    weights = matmul_weights(model)
    attention = attention_forward_flops_per_token(model, seq_length)
    flops = 6 * weights.total + 3.5 * attention
    if recompute in ("selective", "full"):
        flops += attention
    if recompute == "full":
        flops += 2 * weights.layer * weights.layers
    if chunked_loss:
        flops += 2 * weights.head
    return flops


def model_flops_per_step(model: ModelConfig, seq_length: int, global_batch_size: int) -> float:
    """Model FLOPs (MFU convention) of one optimizer step over all ranks."""
    return model_flops_per_token(model, seq_length) * seq_length * global_batch_size


def hardware_flops_per_step(
    model: ModelConfig, seq_length: int, global_batch_size: int, recompute: str = "full", *, chunked_loss: bool = True
) -> float:
    """Hardware FLOPs (HFU convention) of one optimizer step over all ranks."""
    per_token = hardware_flops_per_token(model, seq_length, recompute, chunked_loss=chunked_loss)
    return per_token * seq_length * global_batch_size
