"""What a run may not do: end well without having trained, keep old figures, lose steps to a log, share its folder."""

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from megalong.checkpoint import pointer
from megalong.checkpoint.load import verify_checksums
from megalong.evaluation.results import read_evaluation
from megalong.runtime.errors import UserError
from megalong.runtime.files import hold
from megalong.runtime.ranks import RankPool
from tests.training.disks import small_disk
from tests.training.runs import metrics, outcome_of, run_stage, same, stage_run
from tests.training.test_records import fill_to_the_last_byte

TINY = ["model.num_hidden_layers=1", "train.global_batch_size=2"]


def run_with_nan_weights(run_dir: str, *overrides: str) -> str:
    """A run whose weights turned NaN after they were loaded."""
    stage = stage_run(run_dir, *TINY, *overrides)
    with torch.no_grad():
        next(stage.state.model[0].parameters()).fill_(float("nan"))
    try:
        stage.run()
    except UserError as error:
        return f"{type(error).__name__} {error.exit_code}: {error}"
    return "done"


@pytest.mark.parametrize(
    ("steps", "says"),
    [(9, "NonFiniteError 2: step 5: loss nan.*It is the 5. step in a row"), (3, "none of the 3 steps of this stage")],
)
def test_a_run_in_which_no_step_changes_the_weights_is_no_success(
    ranks: RankPool, tmp_path: Path, steps: int, says: str
) -> None:
    outcome = ranks.run(run_with_nan_weights, 2, str(tmp_path), f"train.steps={steps}", "topology.cp=2")
    for text in outcome:
        assert re.search(says, text), text
    assert pointer.newest(tmp_path / "checkpoints") is None
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == min(steps, 4)  # the step that ends the run is told by its message
    for line in lines:
        record = json.loads(line, parse_constant=pytest.fail)
        assert record["loss"] is None


def test_a_finished_stage_that_is_made_longer_is_evaluated_anew(ranks: RankPool, tmp_path: Path) -> None:
    settings = [*TINY, "data.eval_sequences=2", "train.lr=0.01"]
    ranks.run(run_stage, 1, str(tmp_path), *settings, "train.steps=2")
    short = read_evaluation(tmp_path)
    longer = [*settings, "train.steps=4", "checkpoint.allow_changed=[train.steps]"]
    ranks.run(run_stage, 1, str(tmp_path), *longer, "train.stop_after=3")
    under_way = read_evaluation(tmp_path)
    assert (under_way.before, under_way.after) == (short.before, None)
    ranks.run(run_stage, 1, str(tmp_path), *longer)
    long = read_evaluation(tmp_path)
    assert long.before == short.before
    assert long.after is not None
    assert long.after != short.after


def test_a_folder_in_use_is_refused_before_anything_is_read(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(run_stage, 1, str(tmp_path), *TINY, "train.stop_after=2")
    folder = pointer.newest(tmp_path / "checkpoints")
    assert folder is not None
    file = next(folder.glob("*.distcp"))  # reading it would be the error
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    lock = hold(tmp_path)
    assert lock is not None
    assert "in use by another run" in ranks.run(outcome_of, 1, str(tmp_path), *TINY)[0]
    lock.close()
    assert "was changed after it was written" in ranks.run(outcome_of, 1, str(tmp_path), *TINY)[0]


def run_on_a_filling_disk(run_dir: str, disk: str, free_again_at: int, *overrides: str) -> str:
    """A run during whose second step the disk fills up to its last byte, and gets free again or not."""
    stage = stage_run(run_dir, *TINY, *overrides)
    counting = stage.beside.counting

    def before_a_step() -> AbstractContextManager[Any]:
        if stage.state.step == 1:
            fill_to_the_last_byte(Path(disk))
        if stage.state.step == free_again_at:
            (Path(disk) / "filler").unlink()
        return counting()

    stage.beside.counting = before_a_step  # type: ignore[method-assign]
    try:
        stage.run()
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_a_disk_full_to_the_last_byte_costs_no_step(ranks: RankPool, tmp_path: Path) -> None:
    settings = ["checkpoint.save_steps=1", "data.eval_sequences=1"]
    unbroken = ranks.run(run_stage, 1, str(tmp_path / "a"), *TINY, *settings)
    with small_disk(tmp_path / "disk", 100) as disk:
        run = disk / "run"
        assert ranks.run(run_on_a_filling_disk, 1, str(run), str(disk), 4, *settings) == ["done"]
        assert metrics(run) == metrics(tmp_path / "a")
        assert pointer.newest(run / "checkpoints") == pointer.folder_of(run / "checkpoints", 6)
        assert ranks.run(outcome_of, 1, str(run), *TINY, *settings) == ["done"]
    with small_disk(tmp_path / "disk", 100) as disk:
        run = disk / "run"
        outcome = ranks.run(run_on_a_filling_disk, 1, str(run), str(disk), 99, *settings)[0]
        assert "step 6 cannot be saved" in outcome
        newest = pointer.newest(run / "checkpoints")
        assert newest == pointer.folder_of(run / "checkpoints", 1)
        verify_checksums(newest)
        (disk / "filler").unlink()
        assert same(unbroken, ranks.run(run_stage, 1, str(run), *TINY, *settings))
        assert metrics(run) == metrics(tmp_path / "a")
