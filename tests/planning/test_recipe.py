"""The whole recipe beside the card: what is the card's, what is computed, and what is impossible."""

import pytest

from megalong.planning.recipe import CLUSTERS, RecipeRow, as_json, recipe_row, table
from megalong.planning.workload import open_workload
from megalong.recipe.resolve import run_of

GPUS = {"65k": 8, "262k": 32, "524k": 512, "1048k": 512}


def row(name: str) -> RecipeRow:
    run = run_of([f"+stage={name}", f"cluster={CLUSTERS[GPUS[name]]}"])
    minutes = run.config.stage.card_minutes
    assert minutes is not None
    return recipe_row(name, minutes, open_workload(run), run.config.cluster)


ROWS = [row(name) for name in GPUS]


def test_the_cards_gpu_hours_are_its_minutes_times_its_gpus() -> None:
    assert [found.card_minutes for found in ROWS] == [202, 555, 61, 87]
    assert round(as_json(ROWS)["card_gpu_hours"]) == 1586


def test_only_the_last_row_of_the_card_is_beyond_the_hardware() -> None:
    assert [found.verdict.startswith("beyond") for found in ROWS] == [False, False, False, True]
    assert ROWS[-1].card_model_tflops == pytest.approx(274, rel=0.01)


def test_rings_of_32_beat_one_ring_of_512() -> None:
    for found in ROWS[2:]:
        assert found.single_ring.step_s > 2 * found.card.step_s


def test_every_chosen_layout_fits_and_uses_the_cards_gpus() -> None:
    for found in ROWS:
        assert found.best.fits
        assert found.best.work.layout.world_size == found.gpus == GPUS[found.stage]


def test_the_table_says_what_is_computed_and_with_which_efficiencies() -> None:
    text = table(ROWS)
    assert "all others computed" in text
    assert "gemm_efficiency 0.55 (assumed)" in text
    assert text.count("1048k") >= 2


def test_keeping_attention_takes_a_fifth_of_the_last_stage_and_what_is_left_says_so() -> None:
    found = as_json(ROWS)
    last = found["stages"][-1]
    assert last["chosen"]["recompute"] == "attention_kept"
    assert last["chosen"]["minutes"] < 0.83 * last["full_recompute"]["minutes"]
    assert last["chosen"]["mfu"] > 0.32
    assert found["chosen_gpu_hours"] < 0.85 * found["full_recompute_gpu_hours"]
