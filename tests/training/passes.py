"""One forward and backward pass of a global batch under several settings, compared bit for bit on pool ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megalong.attention import kernels, meters
from megalong.config.schema import AttentionConfig, ModelConfig, TrainConfig
from megalong.run import Run
from megalong.training.verify import local_batches, synthetic_samples
from tests.run_on_ranks import run_on_ranks

WINDOW, BATCH, LAYERS = 64, 4, 4
MODEL = ModelConfig(
    vocab_size=250,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
)


@dataclass
class Pass:
    """What one pass made."""

    loss: float
    gradients: list[torch.Tensor]
    """The fp32 main gradients of this rank, reduced."""
    kernels: Counter[str]
    """Calls of block kernels, "forward" and "backward"."""
    sent: dict[str, int]
    """Bytes of attention's collectives, by kind."""

    def same_as(self, other: Pass) -> bool:
        """Loss and gradients, bit for bit; gradients that are all zero prove nothing."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        return self.loss == other.loss and all(a.abs().sum() > 0 and torch.equal(a, b) for a, b in pairs)


@contextmanager
def counted_kernels() -> Iterator[Counter[str]]:
    """Count the calls of every block kernel that is selected inside the block."""
    calls: Counter[str] = Counter()
    select = kernels.select

    def counting(*args: Any, **rest: Any) -> Any:
        kernel = select(*args, **rest)
        for name in ("forward", "backward"):
            call = getattr(kernel, name)

            def counted(*given: Any, _call: Any = call, _name: str = name) -> Any:
                calls[_name] += 1
                return _call(*given)

            object.__setattr__(kernel, name, counted)
        return kernel

    kernels.select = counting
    try:
        yield calls
    finally:
        kernels.select = select


def run_of(overrides: list[str], **model: Any) -> Run:
    """A tiny run on the ranks of this task, its process groups made."""
    from megalong.topology.groups import initialize

    run = run_on_ranks(["+stage=65k", "+scale=mini", f"train.global_batch_size={BATCH}", *overrides])
    run = replace(run, config=replace(run.config, model=replace(MODEL, **model)), seq_length=WINDOW)
    initialize(run.layout, run.config.attention.hierarchical_context_parallel_sizes)
    return run


def with_settings(run: Run, train: dict[str, Any], attention: dict[str, Any], precision: str) -> Run:
    """The same run under other settings."""
    config = run.config
    return replace(
        run,
        recompute=train.get("recompute", run.recompute),
        mlp_chunk=train.get("mlp_chunk", run.mlp_chunk),
        config=replace(
            config,
            precision=precision,
            train=TrainConfig(**{**vars(config.train), **train}),
            attention=AttentionConfig(**{**vars(config.attention), **attention}),
        ),
    )


def one_pass(run: Run, model: Any = None) -> Pass:
    """Loss and gradients of one global batch with random documents, by a model of random weights."""
    from megalong.model.gpt import build
    from megalong.training.forward import forward_backward

    model = model or build(run)
    batches = local_batches(run, synthetic_samples(run))
    with counted_kernels() as calls, meters.recording() as meter:
        loss, _ = forward_backward(run.seq_length, model, batches, run.micro_batches)
    return Pass(loss, [b.grad_data.clone() for b in model[0].buffers], calls, dict(meter.sent))
