"""What a resume compares: what decides what is trained, and nothing that did not exist when the run was written."""

from pathlib import Path

import pytest

from megalong.recipe.compose import to_yaml
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError
from megalong.training.same_run import check_same_run

MINI = ("+stage=65k", "+scale=mini", "data.path=data")
NEW = ("max_skipped", "allow_tokenizer", "decay:", "min_lr", "decay_steps", "wsd_steps", "wsd_shape")


def test_a_run_from_before_a_setting_existed_is_resumed_without_a_word(tmp_path: Path) -> None:
    config = run_of(MINI, 1).config
    lines = to_yaml(config).splitlines()
    kept = [line for line in lines if not line.strip().startswith(NEW)]
    assert len(lines) - len(kept) == len(NEW)
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    assert check_same_run(config, tmp_path) == []
    told = check_same_run(run_of([*MINI, "train.max_skipped=3", "data.allow_tokenizer=mine"], 1).config, tmp_path)
    assert told == ["data.allow_tokenizer None -> mine", "train.max_skipped 5 -> 3"]  # said, and no other run
    with pytest.raises(ConfigError, match=r"train\.lr 0\.0005 -> 0\.1"):
        check_same_run(run_of([*MINI, "train.lr=0.1"], 1).config, tmp_path)


def test_a_value_that_is_no_longer_allowed_does_not_make_an_old_run_unreadable(tmp_path: Path) -> None:
    config = run_of(MINI, 1).config
    (tmp_path / "config.yaml").write_text(to_yaml(config).replace("  keep: 2\n", "  keep: 0\n"))
    assert check_same_run(config, tmp_path) == []
