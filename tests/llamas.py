"""Small random Llamas as Hugging Face directories, and our model of the same shape on the ranks of a pool."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from megalong.config.schema import Config, ModelConfig, StageConfig, TopologyConfig
from megalong.model.llama import model_from_hf
from megalong.recipe.resolve import resolve
from megalong.run import Run
from megalong.topology.layout import Layout
from tests.run_on_ranks import run_on_ranks

logging.disable_progress_bar()


def hf_config(**changes: Any) -> dict[str, Any]:
    """A small Llama with grouped queries; head_dim is not hidden_size / heads."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 250,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        **changes,
    }


def save_hf(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32, **kwargs: Any) -> None:
    """Write a random Llama with transformers' own writer; norms and biases are random too."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.to(dtype).save_pretrained(folder, **kwargs)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}))


def hf_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """fp32 logits [B, S, V] of transformers."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens_BS).logits


def plain_run(model: ModelConfig, layout: Layout, seq_length: int) -> Run:
    """An fp32 run of a model as it stands in its checkpoint."""
    stage = StageConfig("test", seq_length, None, "fixed", layout.dp, 1, 1e-5, theta=model.rope_theta)
    topology = TopologyConfig(**asdict(layout))
    return resolve(Config(stage=stage, model=model, precision="fp32", topology=topology))


def run_of_saved(hf_dir: Path, overrides: list[str], window: int, theta: float) -> Run:
    """A run of a saved model at a window and a theta that are no stage's."""
    run, model = run_on_ranks(["+stage=65k", "+scale=mini", *overrides]), model_from_hf(hf_dir)
    config = replace(run.config, model=model)
    return replace(run, config=config, seq_length=window, theta=theta, rope_scaling=model.rope_scaling)


def build_on_rank(model: ModelConfig, layout: Layout, seq_length: int) -> torch.nn.Module:
    """This rank's part of the model with random weights; makes the process groups."""
    from megatron.core import parallel_state

    from megalong.model.gpt import LlamaModel, transformer_config
    from megalong.topology import groups

    groups.initialize(layout)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)
    run = plain_run(model, layout, seq_length)
    return LlamaModel(
        transformer_config(run),
        run,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def rank_logits(model: torch.nn.Module, vocab_size: int, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """fp32 logits [B, S, V] of the pipelined, tensor-parallel model on the last pipeline rank; None elsewhere."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    hidden: Any = model.config.hidden_size
    batch, length = tokens_BS.shape
    tp = parallel_state.get_tensor_model_parallel_world_size() if model.config.sequence_parallel else 1
    positions = torch.arange(length).expand(batch, -1)
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            received = torch.empty(length // tp, batch, hidden)
            dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(received)
        output = model(tokens_BS, positions, None)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return gather_from_tensor_model_parallel_region(output)[..., :vocab_size]
