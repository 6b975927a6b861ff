"""A small Llama in transformers, and the same losses and gradients from megatron ranks: shared by parity tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron.core import parallel_state

from megalong.attention.zigzag import chunk_ranges, shard
from megalong.checkpoint.hf import load_hf_into
from megalong.data.loader import MicroBatch
from megalong.model.gpt import build
from megalong.model.llama import model_from_hf
from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_of
from megalong.topology.groups import initialize
from megalong.training.gradients import full_gradients
from megalong.training.step import forward_backward

WINDOW, BATCH, VOCABULARY = 128, 4, 300
THETA = 362987.0


def hf_model(seed: int = 0, **changes: object) -> transformers.LlamaForCausalLM:
    """A Llama of two layers with grouped queries, fp32; norms and biases are random too, so that they are tested."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    } | changes
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float()


def samples(seed: int = 1) -> torch.Tensor:
    """Token ids [BATCH, WINDOW + 1]."""
    return torch.randint(0, VOCABULARY, (BATCH, WINDOW + 1), generator=torch.Generator().manual_seed(seed))


def masks(cp: int, dp: int) -> dict[str, torch.Tensor]:
    """Loss masks [BATCH, WINDOW] of every kind that has hidden a bug somewhere."""
    generator = torch.Generator().manual_seed(2)
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
    return {"all": torch.ones(BATCH, WINDOW), "random": random, "single": single, "one rank empty": one_rank_empty}


def reference(model: transformers.LlamaForCausalLM, mask: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over valid tokens and all gradients, by transformers on one process."""
    model.zero_grad()
    tokens = samples()
    logits = model(input_ids=tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = (losses * mask.flatten()).sum() / mask.sum()
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def on_ranks(hf_dir: str, overrides: list[str], kinds: list[str]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """The same through megatron, by kind of mask; gradients are on rank 0 only."""
    config = compose(["+stage=65k", "+scale=mini", "precision=fp32", *overrides], dist.get_world_size())
    config.model = model_from_hf(Path(hf_dir))
    config.stage.seq_length, config.stage.theta = WINDOW, THETA
    layout = layout_of(config)
    initialize(layout, config.attention.hierarchical_context_parallel_sizes)
    model = build(config)
    load_hf_into(model, Path(hf_dir), config.model)
    micro_batches = BATCH // layout.dp

    def batches(mask: torch.Tensor) -> Iterator[MicroBatch]:
        cp_rank, dp_rank = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
        tokens = samples()
        for i in range(micro_batches):
            row = slice(i * layout.dp + dp_rank, i * layout.dp + dp_rank + 1)
            local = [shard(x[row], layout.cp, cp_rank, 1) for x in (tokens[:, :-1], tokens[:, 1:], mask)]
            yield MicroBatch(tokens=local[0], labels=local[1], loss_mask=local[2], document_starts=None)

    found = {}
    for kind in kinds:
        mask = masks(layout.cp, layout.dp)[kind]
        loss, valid = forward_backward(config, model, batches(mask), micro_batches)
        assert valid == int(mask.sum()), (valid, int(mask.sum()))
        found[kind] = (loss, full_gradients(config, model))
    return found


def saved(model: transformers.LlamaForCausalLM) -> tempfile.TemporaryDirectory:
    """The model as a Hugging Face folder that goes when the returned object does."""
    folder = tempfile.TemporaryDirectory(prefix="megalong-parity-")
    model.save_pretrained(folder.name)
    return folder


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance; absolute where the expected gradient is zero."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
