"""Does a layout compute what one rank computes? The same weights and sequences, loss and every gradient compared.

Sequences are synthetic: random tokens, random documents where boundaries are masked, and a random loss mask, because
uneven masks are where context parallelism has gone wrong before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megalong.attention import canary
from megalong.attention.zigzag import shard
from megalong.checkpoint.hf import load_hf_into
from megalong.config.schema import Config
from megalong.data.loader import MicroBatch
from megalong.model.gpt import attention_of, build
from megalong.recipe.compose import compose
from megalong.recipe.layout import layout_of
from megalong.runtime import device
from megalong.topology.groups import initialize
from megalong.training.gradients import full_gradients
from megalong.training.step import forward_backward


@dataclass(frozen=True)
class Samples:
    """One global batch."""

    tokens: Tensor
    """[batch, L + 1] int64."""
    mask: Tensor
    """[batch, L] float32; 1 where the label counts."""
    document_starts: Tensor | None = None
    """[documents] int64, the same for every sequence; None: no boundaries."""


@dataclass(frozen=True)
class Measured:
    """What one layout made of the samples."""

    loss: float
    gradients: dict[str, Tensor]
    """By Hugging Face name, whole, fp32; on rank 0 only."""


def synthetic_samples(config: Config, seed: int = 0) -> Samples:
    """Random tokens, loss mask and (for document_mask=intra) boundaries for one global batch."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = config.train.global_batch_size or 1, config.stage.seq_length
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).float()
    if config.attention.document_mask == "none":
        return Samples(tokens, mask)
    cuts = torch.randperm(length - 1, generator=generator)[: max(1, min(7, length // 8))] + 1
    return Samples(tokens, mask, torch.cat((torch.zeros(1, dtype=torch.int64), cuts.sort().values)))


def local_batches(config: Config, samples: Samples) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the samples."""
    layout = layout_of(config)
    cp_rank, dp_rank = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
    for i in range(len(samples.tokens) // layout.dp):
        row = slice(i * layout.dp + dp_rank, i * layout.dp + dp_rank + 1)
        whole = (samples.tokens[row, :-1], samples.tokens[row, 1:], samples.mask[row])
        tokens, labels, mask = (shard(x, layout.cp, cp_rank, 1) for x in whole)
        yield MicroBatch(tokens=tokens, labels=labels, loss_mask=mask, document_starts=samples.document_starts)


def measure(config: Config, hf_dir: Path, batches: dict[str, Samples]) -> dict[str, Measured]:
    """Run on every rank of the layout: canary, then loss and gradients of each named global batch.

    Raises:
        CanaryError: information does not cross the context-parallel group as it must.
    """
    layout = layout_of(config)
    assert layout.world_size == dist.get_world_size()
    initialize(layout, config.attention.hierarchical_context_parallel_sizes)
    model = build(config)
    load_hf_into(model, hf_dir, config.model)
    core = attention_of(model)
    if core is not None:
        canary.check(core, parallel_state.get_context_parallel_rank(), device.device())
    found = {}
    for name, samples in batches.items():
        micro_batches = len(samples.tokens) // layout.dp
        loss, valid = forward_backward(config, model, local_batches(config, samples), micro_batches)
        assert valid == int(samples.mask.sum()), (valid, int(samples.mask.sum()))
        found[name] = Measured(loss, full_gradients(config, model))
    return found


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def random_hf(config: Config, folder: Path) -> Path:
    """A Hugging Face directory with random weights of the configured model, norms and biases included."""
    from safetensors.torch import save_file

    from megalong.checkpoint.hf import hf_shapes
    from megalong.model.llama import model_to_hf

    generator = torch.Generator().manual_seed(config.seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else config.model.initializer_range)
        + name.endswith("norm.weight")
        for name, shape in hf_shapes(config.model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model_to_hf(config.model, dtype="float32")))
    return folder


def measure_on_rank(overrides: list[str], hf_dir: str) -> Measured:
    """`measure` of one synthetic global batch, as a task for a pool of ranks."""
    config = compose(overrides, dist.get_world_size())
    return measure(config, Path(hf_dir), {"synthetic": synthetic_samples(config)})["synthetic"]


def compare(expected: Measured, found: Measured, loss_tolerance: float, gradient_tolerance: float) -> bool:
    """Print loss and the distance of every gradient, worst first; returns whether all are within tolerance.

    Args:
        loss_tolerance: relative.
        gradient_tolerance: relative L2 distance of one parameter's gradient.
    """
    loss_error = abs(found.loss - expected.loss) / abs(expected.loss)
    print("canary     passed: forward and backward, all context-parallel ranks")
    print(f"loss       one rank {expected.loss:.7f}  layout {found.loss:.7f}  relative error {loss_error:.1e}")
    errors = {n: relative_distance(found.gradients[n], g) for n, g in expected.gradients.items()}
    errors = {n: math.inf if math.isnan(e) else e for n, e in errors.items()}
    worst = sorted(errors.items(), key=lambda item: -item[1])
    for name, error in worst[:10]:
        print(f"gradient   {error:.1e}  {name}")
    print(f"           ... and {len(worst) - 10} more below {worst[9][1]:.1e}" if len(worst) > 10 else "")
    good = loss_error <= loss_tolerance and worst[0][1] <= gradient_tolerance
    limits = f"loss {loss_tolerance:.0e}, gradients {gradient_tolerance:.0e}"
    print(f"{'PASSED' if good else 'FAILED'}: tolerance {limits}")
    return good
