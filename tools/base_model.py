"""Where does the demo's base model come from? A small Llama made here, trained at its short window in about a minute.

It learns to look up a note that stands in its window (megalong/evaluation/notes.py). The result is a Hugging Face
directory like any base model: config, safetensors, tokenizer. Plain torch on one process, so nothing of the stages'
code is involved in making it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from megalong.config.schema import ModelConfig
from megalong.data.dataset import SequenceDataset, open_dataset
from megalong.recipe.folders import CONF

STEPS = 3000
SECONDS = 150.0
"""Training ends at STEPS or after SECONDS, whichever comes first; the learning rate decays towards that end."""
BATCH = 16  # many small steps learn more from a minute of two cores than few large ones
LEARNING_RATE = 3e-3
WARMUP_STEPS = 20
INITIAL_STD = 0.06  # learns sooner than from the 0.02 that large models start from
EVAL_SEQUENCES = 512
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class BaseReport:
    """What the base model learned, in nats per token."""

    steps: int
    tokens: int
    held_out_loss: float
    unigram_entropy: float
    """Of the training text: the loss of a model that knows how frequent each token is and nothing else."""


def demo_model() -> ModelConfig:
    """conf/model/demo.yaml."""
    tree: Any = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / "model" / "demo.yaml"))
    model = OmegaConf.to_object(tree)
    assert isinstance(model, ModelConfig)
    return model


def make_base_model(data: Path, tokenizer: Path, out: Path, seed: int = 1234) -> BaseReport:
    """Train a randomly initialised Llama of conf/model/demo.yaml on `data` and save it to `out` with its tokenizer.

    Args:
        data: data folder cut for the model's own window.
        tokenizer: folder with the tokenizer's files.
    """
    from transformers import LlamaForCausalLM

    shape = demo_model()
    window, vocabulary = shape.max_position_embeddings, shape.vocab_size
    train, held_out = (open_dataset(data, s, seq_length=window, vocab_size=vocabulary) for s in ("train", "eval"))
    end = shape.eos_token_id
    rows, eval_rows = _rows(train, end), _rows(held_out, end)[:EVAL_SEQUENCES]
    entropy = unigram_entropy(rows, vocabulary)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_hf_config(shape))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters, window {window}, {rows.shape[0] * window:,} tokens of text; "
        f"unigram entropy {entropy:.3f} nats",
        flush=True,
    )
    steps = _train(model, rows, seed)
    loss = _loss(model, eval_rows)
    model.save_pretrained(out)
    for file in tokenizer.iterdir():
        shutil.copy(file, out / file.name)
    return BaseReport(steps, steps * BATCH * window, loss, entropy)


def unigram_entropy(rows: torch.Tensor, vocab_size: int) -> float:
    """Entropy in nats of the token frequencies in `rows`."""
    counts = torch.bincount(rows.flatten(), minlength=vocab_size).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log()).sum())


def _hf_config(shape: ModelConfig) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=shape.eos_token_id,
        eos_token_id=shape.eos_token_id,
        initializer_range=INITIAL_STD,
    )


def _rows(dataset: SequenceDataset, end: int) -> torch.Tensor:
    """All sequences of one document, [sequences, window + 1] int64: without the ends of documents, packed together."""
    full = [i for i in range(len(dataset)) if dataset.valid_length(i) == dataset.seq_length + 1]
    rows = torch.from_numpy(np.stack([dataset.read(i, 0, dataset.seq_length + 1) for i in full])).long()
    return rows[(rows != end).all(1)]


def _loss(model: Any, rows: torch.Tensor) -> float:
    with torch.no_grad():
        return float(_cross_entropy(model, rows))


def _cross_entropy(model: Any, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def _train(model: Any, rows: torch.Tensor, seed: int) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    begun = reported = time.monotonic()
    recent: list[float] = []
    step, progress = 0, 0.0
    while progress < 1.0:
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1.0 - 0.9 * progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        loss = _cross_entropy(model, rows[picked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()))
        step, now = step + 1, time.monotonic()
        progress = max(step / STEPS, (now - begun) / SECONDS)
        if now - reported > REPORT_SECONDS:
            mean, reported = sum(recent) / len(recent), now
            print(f"  step {step:5d}/{STEPS}  loss {mean:.3f}  {now - begun:3.0f} s", flush=True)
            recent = []
    return step
