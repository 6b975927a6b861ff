"""Scores in the training layout are those of plain transformers on the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalong.convert.to_megatron import hf_to_megatron
from megalong.evaluation.checkpoint import evaluation_run, find_checkpoint, layout_for, opened
from megalong.evaluation.documents import edges_of, position_samples
from megalong.evaluation.haystack import BUILTIN, read_haystack
from megalong.evaluation.sample import Sample, Slot
from megalong.evaluation.score import score
from megalong.evaluation.suite import Grid, Suite, make_suite
from megalong.evaluation.tokens import PromptTokenizer
from tests.evaluation.models import WINDOW, save_model, transformers_slots

LAYOUTS = {"one rank": (1, 1, 1), "tp2 cp2": (2, 2, 1), "cp4": (1, 4, 1), "pp2": (1, 1, 2)}
TOLERANCE = 1e-4


def on_ranks(folder: str, sizes: tuple[int, int, int], samples: list[Sample], slots: int) -> list[Slot]:
    checkpoint = find_checkpoint(Path(folder))
    run = evaluation_run(checkpoint.model, layout_for(dist.get_world_size(), *sizes), precision="fp32")
    with opened(checkpoint, run) as model:
        return score(run, model, samples, slots)


def question_suite(folder: Path) -> Suite:
    tokenizer = PromptTokenizer(folder)
    grid = Grid(("needle", "passkey"), (401, 508), (0.0, 0.6), samples=1)
    return make_suite(grid, tokenizer, read_haystack(None, tokenizer))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("scored") / "hf")


@pytest.fixture(scope="module")
def suite(model) -> tuple[list[Sample], int]:
    """Loss by position of three documents, needles and passkeys, all in one list of slots."""
    questions = question_suite(model)
    tokens = torch.tensor(PromptTokenizer(model).encode(BUILTIN.read_text()))
    documents = [tokens[at : at + WINDOW + 1] for at in (0, 700, 1400)]  # an odd number, for data parallelism
    edges = edges_of(WINDOW)
    shifted = [
        Sample(s.tokens, torch.where(s.slots >= 0, s.slots + questions.slots, s.slots))
        for s in position_samples(documents, edges)
    ]
    return [*questions.samples, *shifted], questions.slots + len(edges) - 1


@pytest.fixture(scope="module")
def expected(model, suite) -> list[list[float]]:
    return transformers_slots(model, *suite)


def check(found: list[Slot], expected: list[list[float]]) -> None:
    assert len(found) == len(expected)
    for slot, (loss, hits, tokens) in zip(found, expected, strict=True):
        assert slot.tokens == tokens > 0
        assert slot.mean_loss == pytest.approx(loss / tokens, abs=TOLERANCE)
        assert slot.hits == hits


@pytest.mark.parametrize("name", LAYOUTS)
def test_position_loss_needle_and_passkey_agree_with_transformers(ranks, model, suite, expected, name):
    tp, cp, pp = LAYOUTS[name]
    for found in ranks.run(on_ranks, tp * cp * pp, str(model), LAYOUTS[name], *suite):
        check(found, expected)


def test_samples_are_shared_out_over_data_parallel_ranks_without_being_counted_twice(ranks, model, suite, expected):
    check(ranks.run(on_ranks, 2, str(model), (1, 1, 1), *suite)[1], expected)


def test_a_megatron_checkpoint_gives_the_same_numbers_as_the_hugging_face_directory(ranks, model, suite, tmp_path):
    hf_to_megatron(model, tmp_path / "megatron")
    a = ranks.run(on_ranks, 1, str(model), (1, 1, 1), *suite)[0]
    assert ranks.run(on_ranks, 1, str(tmp_path / "megatron"), (1, 1, 1), *suite)[0] == a


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [float(i + 1) for i in range(8)],
            "original_max_position_embeddings": 450,
        },
    ],
    ids=lambda s: s["rope_type"],
)
def test_a_rope_scaling_is_scored_as_transformers_computes_it(ranks, tmp_path, scaling):
    folder = save_model(tmp_path / "hf", rope_scaling=scaling)
    questions = question_suite(folder)  # 401 tokens lie in the original window of longrope, 508 do not
    found = ranks.run(on_ranks, 2, str(folder), (1, 2, 1), questions.samples, questions.slots)[0]
    check(found, transformers_slots(folder, questions.samples, questions.slots))
