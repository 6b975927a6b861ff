"""What logits do the weights in a directory give? A Llama in fp32, one layer in memory at a time.

This is the reference that `verify` runs over both directories: the plain formulas of Llama (Touvron et al., arXiv
2302.13971), each layer read, applied to a short text, and dropped. Positions are given one by one, so that a handful
of tokens can stand at both ends of a million-token window: there a wrong theta shows, which bitwise equal weights do
not reveal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from megalong.convert.weights import Weights
from megalong.rope.frequencies import rotary_frequencies

_HEAD_ROWS = 16384  # rows of the vocabulary in memory at one time


@torch.no_grad()
def logits(weights: Weights, tokens_S: Tensor, positions_S: Tensor) -> Tensor:
    """Logits [S, V] fp32 of one sequence.

    Args:
        tokens_S: token ids.
        positions_S: position of each token, ascending; a token attends to those before it in the list.
    """
    model, prefix = weights.model, "model.layers.{}."
    hidden_SH = torch.stack(
        [weights.rows("model.embed_tokens.weight", int(t), int(t) + 1)[0].float() for t in tokens_S]
    )
    inv_freq, factor = rotary_frequencies(
        model.rope_theta,
        model.head_dim,
        model.rope_scaling,
        max_position_embeddings=model.max_position_embeddings,
        sequence_length=int(positions_S.max()) + 1,
    )
    angles_SD = (positions_S[:, None].float() * inv_freq).repeat(1, 2)
    cos_SD, sin_SD = angles_SD.cos() * factor, angles_SD.sin() * factor
    for layer in range(model.num_hidden_layers):
        name = prefix.format(layer)
        normed = _norm(weights, name + "input_layernorm", hidden_SH)
        hidden_SH = hidden_SH + _attention(weights, name + "self_attn.", normed, cos_SD, sin_SD)
        normed = _norm(weights, name + "post_attention_layernorm", hidden_SH)
        gate, up = (_linear(weights, f"{name}mlp.{which}_proj", normed) for which in ("gate", "up"))
        hidden_SH = hidden_SH + _linear(weights, name + "mlp.down_proj", functional.silu(gate) * up)
    hidden_SH = _norm(weights, "model.norm", hidden_SH)
    head = "model.embed_tokens.weight" if model.tie_word_embeddings else "lm_head.weight"
    rows = range(0, model.vocab_size, _HEAD_ROWS)
    ends = [min(model.vocab_size, start + _HEAD_ROWS) for start in rows]
    parts = [hidden_SH @ weights.rows(head, a, b).float().T for a, b in zip(rows, ends, strict=True)]
    return torch.cat(parts, dim=1)


def _attention(weights: Weights, name: str, x_SH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    length, dim = len(x_SH), weights.model.head_dim
    query, key, value = (
        _linear(weights, f"{name}{which}_proj", x_SH).view(length, -1, dim).transpose(0, 1) for which in "qkv"
    )
    query, key = _rotate(query, cos_SD, sin_SD), _rotate(key, cos_SD, sin_SD)
    repeat = len(query) // len(key)
    key, value = (x.repeat_interleave(repeat, dim=0) for x in (key, value))
    scores = query @ key.transpose(1, 2) / dim**0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
    return _linear(weights, f"{name}o_proj", mixed.transpose(0, 1).reshape(length, -1))


def _rotate(x_NSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    first, second = x_NSD.chunk(2, dim=-1)
    return x_NSD * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD


def _linear(weights: Weights, name: str, x_SH: Tensor) -> Tensor:
    bias = weights.whole(f"{name}.bias").float() if f"{name}.bias" in weights.tensors else None
    return functional.linear(x_SH, weights.whole(f"{name}.weight").float(), bias)


def _norm(weights: Weights, name: str, x_SH: Tensor) -> Tensor:
    scale = torch.rsqrt(x_SH.pow(2).mean(-1, keepdim=True) + weights.model.rms_norm_eps)
    return weights.whole(f"{name}.weight").float() * (x_SH * scale)
