"""A small Llama in transformers, and the same losses and gradients from megatron ranks: shared by parity tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import transformers

from megalong.attention.zigzag import chunk_ranges
from megalong.training.verify import Measured, Samples, measure
from tests.llamas import run_of_saved

WINDOW, BATCH, VOCABULARY = 128, 4, 300
THETA = 362987.0
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}


def hf_model(seed: int = 0, **changes: object) -> transformers.LlamaForCausalLM:
    """A Llama of two layers with grouped queries, fp32; norms and biases are random too, so that they are tested."""
    torch.manual_seed(seed)
    shape = SHAPE | {
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    shape |= changes
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float()


def samples(cp: int, dp: int) -> dict[str, Samples]:
    """Global batches with a loss mask of every kind that has hidden a bug somewhere."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (BATCH, WINDOW + 1), generator=generator)
    random = (torch.rand(BATCH, WINDOW, generator=generator) < 0.6).float()
    single = torch.zeros(BATCH, WINDOW)
    single[1, 37] = 1.0
    one_rank_empty = torch.ones(BATCH, WINDOW)
    if cp > 1:
        for start, stop in chunk_ranges(WINDOW, cp, 1):
            one_rank_empty[:, start:stop] = 0.0
    elif dp > 1:
        one_rank_empty[1::dp] = 0.0
    else:
        one_rank_empty[:, : WINDOW // 2] = 0.0
    masks = {"all": torch.ones(BATCH, WINDOW), "random": random, "single": single, "one rank empty": one_rank_empty}
    return {name: Samples(tokens, mask) for name, mask in masks.items()}


def reference(model: transformers.LlamaForCausalLM, batch: Samples) -> Measured:
    """Mean loss over valid tokens and all gradients, by transformers on one process."""
    model.zero_grad()
    logits = model(input_ids=batch.tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    loss = (losses * batch.mask.flatten()).sum() / batch.mask.sum()
    loss.backward()
    return Measured(float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def on_ranks(hf_dir: str, overrides: list[str]) -> dict[str, Measured]:
    """The same through megatron, by kind of mask."""
    run = run_of_saved(Path(hf_dir), ["precision=fp32", *overrides], WINDOW, THETA)
    return measure(run, Path(hf_dir), samples(run.layout.cp, run.layout.dp))


def saved(model: transformers.LlamaForCausalLM) -> tempfile.TemporaryDirectory:
    """The model as a Hugging Face folder that goes when the returned object does."""
    folder = tempfile.TemporaryDirectory(prefix="megalong-parity-")
    model.save_pretrained(folder.name)
    return folder
