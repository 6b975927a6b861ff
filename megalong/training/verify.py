"""Proof that a layout computes what one rank computes: same weights and sequences, loss and every gradient compared.

Sequences are synthetic: random tokens, random documents (others in every sequence) where boundaries are masked, and a
random loss mask, because uneven masks are where context parallelism has gone wrong before.
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

from megalong.attention.zigzag import shard
from megalong.convert.parameters import load_hf_into
from megalong.data.loader import MicroBatch
from megalong.model.gpt import build
from megalong.recipe.resolve import run_of
from megalong.run import Run
from megalong.topology.groups import initialize
from megalong.training.canary import run_canary
from megalong.training.forward import forward_backward
from megalong.training.gradients import full_gradients


@dataclass(frozen=True)
class Samples:
    """One global batch."""

    tokens: Tensor
    """[batch, L + 1] int64."""
    mask: Tensor
    """[batch, L] float32; 1 where the label counts."""
    document_starts: list[Tensor] | None = None
    """Of each sequence [documents] int64; None: no boundaries."""


@dataclass(frozen=True)
class Measured:
    """What one layout made of the samples."""

    loss: float
    gradients: dict[str, Tensor]
    """By Hugging Face name, whole, fp32; on rank 0 only."""
    canary: str = "not run"
    """What came of it."""


def synthetic_samples(run: Run, seed: int = 0) -> Samples:
    """Random tokens, loss mask and (for document_mask=intra) boundaries for one global batch."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = run.global_batch_size, run.seq_length
    tokens = torch.randint(0, run.model.vocab_size, (batch, length + 1), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).float()
    if run.config.attention.document_mask == "none":
        return Samples(tokens, mask)
    documents, first = max(1, min(7, length // 8)), torch.zeros(1, dtype=torch.int64)
    cuts = [torch.randperm(length - 1, generator=generator)[:documents] + 1 for _ in range(batch)]
    return Samples(tokens, mask, [torch.cat((first, row.sort().values)) for row in cuts])


def local_batches(run: Run, samples: Samples) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the samples."""
    layout = run.layout
    cp_rank, dp_rank = parallel_state.get_context_parallel_rank(), parallel_state.get_data_parallel_rank()
    for i in range(len(samples.tokens) // layout.dp):
        sequence = i * layout.dp + dp_rank
        row = slice(sequence, sequence + 1)
        whole = (samples.tokens[row, :-1], samples.tokens[row, 1:], samples.mask[row])
        tokens, labels, mask = (shard(x, layout.cp, cp_rank, 1) for x in whole)
        starts = samples.document_starts[sequence] if samples.document_starts is not None else None
        yield MicroBatch(tokens=tokens, labels=labels, loss_mask=mask, document_starts=starts)


def measure(run: Run, hf_dir: Path, batches: dict[str, Samples]) -> dict[str, Measured]:
    """Run on every rank of the layout: canary, then loss and gradients of each named global batch.

    Raises:
        CanaryError: information does not cross the context-parallel group as it must.
    """
    layout = run.layout
    assert layout.world_size == dist.get_world_size()
    initialize(layout, run.config.attention.hierarchical_context_parallel_sizes)
    model = build(run)
    load_hf_into(model, hf_dir, run.model)
    looked = canary_told(run_canary(model), layout.cp)
    found = {}
    for name, samples in batches.items():
        micro_batches = len(samples.tokens) // layout.dp
        loss, valid = forward_backward(run.seq_length, model, local_batches(run, samples), micro_batches)
        assert valid == int(samples.mask.sum()), (valid, int(samples.mask.sum()))
        found[name] = Measured(loss, full_gradients(run, model), looked)
    return found


def canary_told(could_look: bool, cp: int) -> str:
    if not could_look:
        return "skipped: it cannot look into the attention of Transformer Engine"
    return f"passed: forward and backward, {f'all {cp} context-parallel ranks' if cp > 1 else 'one rank'}"


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def random_hf(run: Run, folder: Path) -> Path:
    """A Hugging Face directory with random weights of the configured model, norms and biases included."""
    from safetensors.torch import save_file

    from megalong.convert.table import hf_shapes
    from megalong.model.llama import model_to_hf

    model, generator = run.model, torch.Generator().manual_seed(run.config.seed)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 1 else model.initializer_range)
        + name.endswith("norm.weight")
        for name, shape in hf_shapes(model).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model_to_hf(model, dtype="float32")))
    return folder


def measure_on_rank(overrides: list[str], hf_dir: str) -> Measured:
    """`measure` of one synthetic global batch, as a task for a pool of ranks."""
    run = run_of(overrides, dist.get_world_size())
    return measure(run, Path(hf_dir), {"synthetic": synthetic_samples(run)})["synthetic"]


def compare(expected: Measured, found: Measured, loss_tolerance: float, gradient_tolerance: float) -> bool:
    """Print loss and the distance of every gradient, worst first; returns whether all are within tolerance.

    Args:
        loss_tolerance: relative.
        gradient_tolerance: relative L2 distance of one parameter's gradient.
    """
    loss_error = abs(found.loss - expected.loss) / abs(expected.loss)
    print(f"canary     {found.canary}")
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
