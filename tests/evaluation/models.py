"""A small Llama with a tokenizer of English, as a Hugging Face folder, and what transformers makes of samples."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from megalong.data.builtin import train_tokenizer
from megalong.evaluation.haystack import BUILTIN
from megalong.evaluation.sample import Sample
from tests.llamas import hf_config, save_hf

WINDOW, VOCABULARY = 512, 384


def save_model(folder: Path, **changes: object) -> Path:
    """A random model of a window of 512 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "max_position_embeddings": WINDOW} | changes
    save_hf(folder, hf_config(**shape))
    train_tokenizer([BUILTIN.read_text()], VOCABULARY, folder)
    return folder


def transformers_slots(folder: Path, samples: list[Sample], slots: int) -> list[list[float]]:
    """[loss, hits, tokens] of each slot by transformers alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total = torch.zeros(slots, 3, dtype=torch.float64)
    with torch.no_grad():
        for sample in samples:
            logits = model(sample.tokens[None, :-1]).logits[0]
            losses = torch.nn.functional.cross_entropy(logits, sample.tokens[1:], reduction="none")
            hits = (logits.argmax(-1) == sample.tokens[1:]).double()
            for i, slot in enumerate(sample.slots[1:].tolist()):
                if slot >= 0:
                    total[slot] += torch.tensor([losses[i].double(), hits[i], 1.0])
    return total.tolist()
