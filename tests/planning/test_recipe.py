"""The whole recipe beside the card: what is the card's, what is computed, and what is impossible."""

import pytest

from megalong.planning.recipe import as_json, recipe_rows, table

ROWS = recipe_rows()


def test_the_cards_gpu_hours_are_its_minutes_times_its_gpus() -> None:
    assert [row.card_minutes for row in ROWS] == [202, 555, 61, 87]
    assert round(as_json(ROWS)["card_gpu_hours"]) == 1586


def test_only_the_last_row_of_the_card_is_beyond_the_hardware() -> None:
    assert [row.verdict.startswith("beyond") for row in ROWS] == [False, False, False, True]
    assert ROWS[-1].card_model_tflops == pytest.approx(274, rel=0.01)


def test_rings_of_32_beat_one_ring_of_512() -> None:
    for row in ROWS[2:]:
        assert row.single_ring.step_s > 2 * row.card.step_s


def test_every_chosen_layout_fits_and_uses_the_cards_gpus() -> None:
    for row in ROWS:
        assert row.best.fits
        assert row.best.work.layout.world_size == row.gpus


def test_the_table_says_what_is_computed_and_with_which_efficiencies() -> None:
    text = table(ROWS)
    assert "all others computed" in text
    assert "gemm_efficiency 0.55 (assumed)" in text
    assert text.count("1048k") >= 2
