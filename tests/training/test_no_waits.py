"""Between the first micro-batch and the last gradient the host never waits for the device."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalong.runtime.ranks import RankPool
from megalong.training.verify import local_batches, synthetic_samples
from tests.training.passes import run_of, with_settings

OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
"""Whose result the host must know: `.item()`, `bool(tensor)`, indexing by a mask."""
METHODS = ("tolist", "cpu", "numpy")
"""Which copy to the host without an operator of their own on the CPU."""


class Waits(TorchDispatchMode):
    """Notes where this project or megatron-core makes the host wait for what a device computed.

    On a CPU the same operators run, so what they are called for is what they would be called for on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self._methods = {name: getattr(torch.Tensor, name) for name in METHODS}

    def __enter__(self) -> Any:
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, lambda *args, _method=method: (self.note(), _method(*args))[1])
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for name, method in self._methods.items():
            setattr(torch.Tensor, name, method)

    def note(self) -> None:
        frames = [f for f in traceback.extract_stack() if "/megalong/" in f.filename or "/megatron/" in f.filename]
        if frames[-1].name not in ("_documents", "fork"):  # boundaries and random states lie in host memory
            self.places.append(f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in OPERATORS:
            self.note()
        return func(*args, **(kwargs or {}))


def places(overrides: list[str]) -> list[str]:
    """Where a pass waits."""
    from megalong.model.gpt import build
    from megalong.training.forward import forward_backward

    run = run_of(overrides, num_hidden_layers=1)
    run = with_settings(run, {"recompute": "attention_kept", "mlp_chunk": 8}, {"document_mask": "intra"}, "bf16")
    model, batches = build(run), list(local_batches(run, synthetic_samples(run)))
    with Waits() as waits:
        forward_backward(run.seq_length, model, iter(batches), run.micro_batches)
    return waits.places


def test_the_host_waits_only_when_all_gradients_are_there(ranks: RankPool) -> None:
    """megatron-core asks for the number of valid tokens before it divides by it, then the loss is read."""
    once = ["finalize_model_grads.py:finalize_model_grads", "forward.py:forward_backward"]
    assert ranks.run(places, 4, ["topology.tp=2", "topology.cp=2"]) == [once] * 4
