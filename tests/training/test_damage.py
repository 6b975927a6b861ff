"""Nothing damaged is ever loaded: the checkpoint before it is used, or a clear error is given."""

import shutil
from pathlib import Path

import pytest

from megalong.checkpoint import pointer
from megalong.checkpoint.checksums import read_checksums, write_checksums
from megalong.runtime.files import sha256_of
from megalong.runtime.ranks import RankPool
from tests.training.runs import metrics, run_stage, same
from tests.variants import long_but

TINY = ["model.num_hidden_layers=1", "train.global_batch_size=2", "train.steps=4", "topology.dp=2"]
NEWEST = "step_00000002"


@pytest.fixture(scope="module")
def half(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list, list]:
    """A run after 2 of 4 steps, each saved, and what the unbroken run ends with."""
    folder = tmp_path_factory.mktemp("half")
    unbroken = ranks.run(run_stage, 2, str(folder / "unbroken"), *TINY)
    ranks.run(run_stage, 2, str(folder / "half"), *TINY, "checkpoint.save_steps=1", "train.stop_after=2")
    return folder / "half", unbroken, metrics(folder / "unbroken")


def where_it_starts(run_dir: str) -> tuple[int, str]:
    """Step at which the run resumes, or the error."""
    from megalong.runtime.errors import UserError
    from tests.training.runs import stage_run

    try:
        return stage_run(run_dir, *TINY).state.step, ""
    except UserError as error:
        return -1, str(error)


def copy_of(half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half, tmp_path / "run"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", long_but(["flip", "delete", "cut"], "flip"))
def test_every_file_of_the_newest_checkpoint(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path, damage: str
) -> None:
    names = [p.relative_to(half[0] / "checkpoints" / NEWEST) for p in (half[0] / "checkpoints" / NEWEST).rglob("*")]
    names = [n for n in names if (half[0] / "checkpoints" / NEWEST / n).is_file()]
    assert len(names) > 6
    for name in names:
        run = copy_of(half[0], tmp_path)
        file = run / "checkpoints" / NEWEST / name
        if damage == "flip":
            flip(file)
        elif damage == "delete":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-2])
        assert ranks.run(where_it_starts, 2, str(run)) == [(1, "")] * 2, name
        shutil.rmtree(run)


def test_after_damage_the_run_ends_as_if_nothing_had_been(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path
) -> None:
    run = copy_of(half[0], tmp_path)
    root = run / "checkpoints"
    flip(next((root / NEWEST).glob("*.distcp")))
    assert same(half[1], ranks.run(run_stage, 2, str(run), *TINY))
    assert metrics(run) == half[2]
    assert (root / f"{NEWEST}.damaged").is_dir()
    assert (root / "latest").read_text().strip() == "step_00000004"


@pytest.mark.parametrize("text", ["", "step_00000099\n", "nonsense"])
def test_a_pointer_that_is_empty_or_wrong(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path, text: str
) -> None:
    run = copy_of(half[0], tmp_path)
    (run / "checkpoints" / "latest").write_text(text)
    assert ranks.run(where_it_starts, 2, str(run)) == [(2, "")] * 2


def test_a_pointer_that_is_gone(half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path) -> None:
    run = copy_of(half[0], tmp_path)
    (run / "checkpoints" / "latest").unlink()
    assert ranks.run(where_it_starts, 2, str(run)) == [(2, "")] * 2


def test_when_all_are_damaged_the_run_says_so_and_overwrites_nothing(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path
) -> None:
    run = copy_of(half[0], tmp_path)
    for folder in pointer.whole_ones(run / "checkpoints"):
        flip(next(folder.glob("*.distcp")))
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    for step, text in ranks.run(where_it_starts, 2, str(run)):
        assert step == -1
        assert "damaged" in text
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def test_a_pointer_set_back_by_hand_keeps_the_later_checkpoint_aside(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path
) -> None:
    run = copy_of(half[0], tmp_path)
    root = run / "checkpoints"
    (root / "latest").write_text("step_00000001\n")
    assert same(half[1], ranks.run(run_stage, 2, str(run), *TINY))
    assert (root / f"{NEWEST}.superseded").is_dir()


def test_what_travels_along_outlives_the_checkpoint_it_came_from(
    half: tuple[Path, list, list], ranks: RankPool, tmp_path: Path
) -> None:
    run = copy_of(half[0], tmp_path)
    folder = run / "checkpoints" / NEWEST
    (folder / "hf_files").mkdir()
    file = folder / "hf_files" / "tokenizer.json"
    file.write_text("tokens")
    sums = {**(read_checksums(folder) or {}), "hf_files/tokenizer.json": {"bytes": 6, "sha256": sha256_of(file)}}
    write_checksums(folder, sums)
    ranks.run(run_stage, 2, str(run), *TINY, "checkpoint.save_steps=1", "checkpoint.keep=1")
    assert not folder.exists()
    assert (run / "checkpoints" / "step_00000004" / "hf_files" / "tokenizer.json").read_text() == "tokens"
