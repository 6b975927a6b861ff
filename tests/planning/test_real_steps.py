"""What the plan says of bytes moved and bytes kept is exactly what real megatron ranks move and keep."""

import pytest

from megalong.planning.parameters import rank_parameters, static_bytes
from megalong.planning.traffic import step_bytes
from megalong.planning.workload import Workload, workload_of
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from tests.planning.steps import Observed, observe

# One micro-batch or two, layers and vocabulary that do not divide evenly into buckets, every algorithm and policy.
CASES = {
    "tensor and context": (4, ["topology.tp=2", "topology.cp=2"]),
    "pipeline, tied embeddings": (4, ["topology.pp=2", "topology.cp=2", "model.tie_word_embeddings=true"]),
    "head exchange and replicas": (4, ["topology.dp=2", "topology.cp=2", "attention.cp_comm_type=a2a"]),
    "heads inside, ring outside, no recompute": (
        4,
        [
            "topology.cp=4",
            "attention.cp_comm_type=a2a+p2p",
            "attention.hierarchical_context_parallel_sizes=[2,2]",
            "train.recompute=none",
        ],
    ),
    "all-gather, selective recompute, narrow gradient wire": (
        4,
        [
            "topology.cp=4",
            "attention.cp_comm_type=all_gather",
            "train.recompute=selective",
            "attention.grad_wire_dtype=model",
        ],
    ),
    "tensor only, chunked loss, fp32": (4, ["topology.tp=4", "train.loss_chunk=64", "precision=fp32"]),
    "ring of four, fp32, tied": (4, ["topology.cp=4", "precision=fp32", "model.tie_word_embeddings=true"]),
    "replicas only, odd vocabulary": (2, ["topology.dp=2", "model.vocab_size=4001"]),
    "all but replicas, biases": (
        8,
        [
            "topology.tp=2",
            "topology.cp=2",
            "topology.pp=2",
            "train.loss_chunk=32",
            "model.attention_bias=true",
            "model.mlp_bias=true",
        ],
    ),
    "all but pipeline, odd vocabulary": (
        8,
        ["topology.tp=2", "topology.cp=2", "topology.dp=2", "train.loss_chunk=0", "model.vocab_size=4001"],
    ),
}


def settings(overrides: list[str]) -> list[str]:
    small = ["+stage=65k", "+scale=mini", "train.global_batch_size=2", "model.num_hidden_layers=2"]
    return [*small, *overrides]


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def case(request: pytest.FixtureRequest, ranks: RankPool) -> tuple[Workload, list[Observed]]:
    world_size, overrides = CASES[request.param]
    return workload_of(run_of(settings(overrides), world_size)), ranks.run(observe, world_size, settings(overrides))


def test_bytes_of_every_collective_equal_those_counted(case):
    work, observed = case
    for rank, seen in enumerate(observed):
        assert step_bytes(work, work.layout.coordinates(rank).pp) == seen.sent, f"rank {rank}"


def test_weight_gradient_and_optimizer_bytes_equal_megatrons(case):
    work, observed = case
    for rank, seen in enumerate(observed):
        found = static_bytes(work, work.layout.coordinates(rank))
        assert (found.weights, found.gradients, found.optimizer) == (seen.weights, seen.gradients, seen.optimizer)


def test_parameters_are_those_of_the_real_model_in_its_order(case):
    work, observed = case
    for rank, seen in enumerate(observed):
        at = work.layout.coordinates(rank)
        expected = {p.name: p.shape for p in rank_parameters(work.model, work.layout.tp, work.layout.pp, at.pp)}
        assert list(expected.items()) == list(seen.parameters.items())
