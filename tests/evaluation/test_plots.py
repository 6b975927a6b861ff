"""An evaluation survives the disk, and its plot is a picture that shows both curves."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from megalong.evaluation.plots import AFTER, BEFORE, plot_loss_by_position
from megalong.evaluation.position import LossByPosition
from megalong.evaluation.results import StageEvaluation, read_evaluation
from megalong.runtime.errors import DataError


def evaluation(seq_length: int) -> StageEvaluation:
    edges = [seq_length * i // 16 for i in range(17)]
    before = LossByPosition(edges, [3.0 + 0.2 * i for i in range(16)], 5.7)
    after = LossByPosition(edges, [3.0 - 0.02 * i for i in range(15)] + [None], 2.7)
    return StageEvaluation(seq_length, before, after)


def test_an_evaluation_reads_back_as_written(tmp_path):
    for stage in (evaluation(256), StageEvaluation(256, evaluation(256).before, None)):
        stage.write(tmp_path)
        assert read_evaluation(tmp_path) == stage


def test_what_was_written_before_there_was_more_is_still_read(tmp_path):
    curve = {"edges": [0, 2, 4], "loss": [3.0, None], "last_quarter": 2.5}
    (tmp_path / "evaluation.json").write_text(json.dumps({"seq_length": 4, "before": curve, "after": None}))
    found = read_evaluation(tmp_path)
    assert found == StageEvaluation(4, LossByPosition([0, 2, 4], [3.0, None], 2.5), None)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "was not evaluated"), ("{", "is damaged: not JSON"), ("{}", "missing keys")]
)
def test_a_missing_or_foreign_evaluation_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match=words):
        read_evaluation(tmp_path)


def test_the_plot_has_a_panel_per_stage_with_both_curves(tmp_path):
    stages = {f"stage {n}": evaluation(n) for n in (256, 1024, 4096)}
    plot_loss_by_position(stages, tmp_path / "loss.png", "loss by position")
    image = imread(tmp_path / "loss.png")
    height, width = image.shape[:2]
    assert width > 2 * height
    for color in (BEFORE, AFTER):
        rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        columns = np.where((np.abs(image[..., :3] - rgb) < 0.02).all(-1).any(0))[0] * 3 // width
        assert set(columns) == {0, 1, 2}
