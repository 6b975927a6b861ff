"""The gradient of the output layer is summed in fp32: as exact in 64 pieces as in one, whoever shares its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megalong.convert.parameters import load_hf_into
from megalong.convert.safetensors_dir import SafetensorsDirectory
from megalong.model.gpt import build
from megalong.run import Run
from megalong.runtime.ranks import RankPool
from megalong.topology.groups import initialize
from megalong.training.forward import forward_backward
from megalong.training.gradients import full_gradients
from megalong.training.verify import Samples, local_batches, relative_distance
from tests.llamas import run_of_saved
from tests.training.parity import BATCH, THETA, VOCABULARY, WINDOW, hf_model, reference, saved


def batch() -> Samples:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (BATCH, WINDOW + 1), generator=generator)
    return Samples(tokens, (torch.rand(BATCH, WINDOW, generator=generator) < 0.6).float())


def small_run(folder: str, overrides: list[str]) -> Run:
    """A run of the saved model; makes the process groups."""
    run = run_of_saved(Path(folder), overrides, WINDOW, THETA)
    initialize(run.layout)
    return run


def gradients(folder: str, overlap: bool, overrides: list[str]) -> dict[str, torch.Tensor]:
    """All gradients of a second step; on rank 0."""
    run = small_run(folder, ["precision=fp32", "train.loss_chunk=16", *overrides])
    model = build(run, overlap=overlap)
    load_hf_into(model, Path(folder), run.model)
    for _ in range(2):  # megatron learns in the first step when a bucket is complete, and reduces at its end
        forward_backward(WINDOW, model, local_batches(run, batch()), BATCH // run.layout.dp)
    return full_gradients(run, model)


def errors_of_the_head(folder: str, chunks: list[int], overrides: list[str]) -> list[float]:
    """Relative error of the weight's gradient against fp64 at the same bf16 hidden states, for each `loss_chunk`."""
    run = small_run(folder, ["precision=bf16", *overrides])
    tp, rank = run.layout.tp, parallel_state.get_tensor_model_parallel_rank()
    torch.manual_seed(2)
    hidden = torch.randn(WINDOW, 1, run.model.hidden_size).bfloat16()
    labels = torch.randint(0, VOCABULARY, (1, WINDOW))
    found = []
    for chunk in chunks:
        run = replace(run, config=replace(run.config, train=replace(run.config.train, loss_chunk=chunk)))
        model = build(run)
        load_hf_into(model, Path(folder), run.model)
        model[0].zero_grad_buffer()
        here = hidden.chunk(tp)[rank].detach().requires_grad_()
        model[0].module.module.token_losses(here, labels).sum().backward()
        found.append(full_gradients(run, model))
    if dist.get_rank():
        return []
    name = "model.embed_tokens.weight" if run.model.tie_word_embeddings else "lm_head.weight"
    with SafetensorsDirectory(Path(folder)) as source:
        weight = source.rows(name, 0, VOCABULARY).double().requires_grad_()
    logits = hidden[:, 0].double() @ weight.T
    torch.nn.functional.cross_entropy(logits, labels[0], reduction="sum").backward()
    assert weight.grad is not None
    return [relative_distance(one[name], weight.grad) for one in found]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("tp", [1, 2], ids=["tp1", "tp2"])
def test_bf16_error_does_not_grow_with_the_number_of_pieces(ranks: RankPool, tied: bool, tp: int) -> None:
    with saved(hf_model(tie_word_embeddings=tied).bfloat16().float()) as folder:
        whole, pieces = ranks.run(errors_of_the_head, tp, folder, [0, WINDOW // 64], [f"topology.tp={tp}"])[0]
    assert max(whole, pieces) < 0.006
    assert pieces <= 1.1 * whole


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layout", [["topology.dp=2"], ["topology.pp=2"]], ids=str)
def test_reducing_during_backward_changes_no_gradient(ranks: RankPool, tied: bool, layout: list[str]) -> None:
    """As on CUDA, where a bucket is sent off as soon as all of its gradients are there."""
    model = hf_model(tie_word_embeddings=tied)
    with saved(model) as folder:
        after, during = (ranks.run(gradients, 2, folder, overlap, layout)[0] for overlap in (False, True))
    expected = reference(model, batch()).gradients
    assert max(relative_distance(after[name], grad) for name, grad in expected.items()) < 1e-4
    assert after.keys() == during.keys()
    assert all(torch.equal(during[name], grad) for name, grad in after.items())
