"""Loss and every gradient equal transformers' on one process, in every layout, with every kind of mask."""

from collections.abc import Iterator

import pytest
import transformers

from megalong.runtime.ranks import RankPool
from megalong.training.verify import relative_distance
from tests.training.parity import hf_model, on_ranks, reference, samples, saved
from tests.variants import long_but

LAYOUTS = [
    # tp, cp, pp, dp
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 4, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (2, 2, 1, 2),
    (2, 2, 2, 1),
]


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[transformers.LlamaForCausalLM, str]]:
    model = hf_model()
    with saved(model) as folder:
        yield model, folder


def sizes(tp: int, cp: int, pp: int, dp: int) -> list[str]:
    return [f"topology.tp={tp}", f"topology.cp={cp}", f"topology.pp={pp}", f"topology.dp={dp}"]


def check(ranks: RankPool, model: transformers.LlamaForCausalLM, folder: str, layout: tuple, *overrides: str) -> None:
    tp, cp, pp, dp = layout
    found = ranks.run(on_ranks, tp * cp * pp * dp, folder, [*sizes(*layout), *overrides])
    for kind, batch in samples(cp, dp).items():
        expected = reference(model, batch)
        for rank in found:
            assert rank[kind].loss == pytest.approx(expected.loss, rel=1e-5), kind
        gradients = found[0][kind].gradients
        worst = {name: relative_distance(gradients[name], grad) for name, grad in expected.gradients.items()}
        assert max(worst.values()) <= 1e-4, (kind, {n: w for n, w in worst.items() if w > 1e-4})


@pytest.mark.parametrize(
    "layout",
    long_but(LAYOUTS, (1, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 2), (2, 2, 2, 1)),
    ids=lambda x: "tp{} cp{} pp{} dp{}".format(*x),
)
def test_loss_and_gradients_are_transformers(ranks: RankPool, llama: tuple, layout: tuple) -> None:
    check(ranks, *llama, layout)


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention.cp_comm_type=a2a"],
        ["attention.cp_comm_type=all_gather"],
        ["attention.cp_comm_type=a2a+p2p", "attention.hierarchical_context_parallel_sizes=[2,2]"],
    ],
    ids=["a2a", "all_gather", "a2a+p2p"],
)
def test_every_way_to_move_keys_gives_the_same(ranks: RankPool, llama: tuple, overrides: list[str]) -> None:
    check(ranks, *llama, (1, 4, 1, 1), *overrides)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_recompute_does_not_change_them(ranks: RankPool, llama: tuple, recompute: str) -> None:
    check(ranks, *llama, (2, 2, 1, 1), f"train.recompute={recompute}")


@pytest.mark.parametrize("chunk", [0, 7, 10_000])
def test_the_chunk_of_the_loss_does_not_change_them(ranks: RankPool, llama: tuple, chunk: int) -> None:
    check(ranks, *llama, (2, 1, 1, 1), f"train.loss_chunk={chunk}")


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True, "attention_bias": True},
        {"vocab_size": 301},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 362987.0, "factor": 4.0}},
    ],
    ids=lambda c: " ".join(c),
)
def test_every_kind_of_llama(ranks: RankPool, changes: dict) -> None:
    model = hf_model(**changes)
    with saved(model) as folder:
        check(ranks, model, folder, (2, 1, 2, 1))
