"""What a save may not do: cost the run, keep what is half-written, or write what the training has since changed."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from megalong.checkpoint import pointer
from megalong.checkpoint.load import verify_checksums
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError
from megalong.runtime.ranks import RankPool
from megalong.training.disk_space import check_disk_space
from tests.training.disks import fill, make_read_only, small_disk
from tests.training.runs import metrics, outcome_of, run_stage, same
from tests.variants import long_but

TINY = ["model.num_hidden_layers=1", "train.global_batch_size=2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_in_the_background_and_train_on(run_dir: str, beside: str) -> None:
    """Four steps, each saved; the thread that writes beside the training is held back until a step later."""
    import threading

    from megalong.checkpoint import threads
    from tests.training.runs import stage_run

    settings = ["checkpoint.save_steps=1", "checkpoint.keep=9", f"checkpoint.asynchronous={beside}"]
    stage = stage_run(run_dir, *TINY, "train.stop_after=4", "topology.dp=2", *settings)
    stepped = threading.Event()
    write, counting = threads._write_in_threads, stage.beside.counting

    def held_back(*args: object) -> None:
        stepped.wait(10)
        write(*args)  # type: ignore[arg-type]

    @contextmanager
    def around_a_step() -> Iterator[None]:
        stepped.clear()
        with counting():
            yield
        stepped.set()

    if beside == "true":
        threads._write_in_threads = held_back  # type: ignore[assignment]
        stage.beside.counting = around_a_step  # type: ignore[method-assign]
    try:
        stage.run()
    finally:
        threads._write_in_threads = write


def test_what_is_written_beside_the_training_is_the_step_it_was_taken_at(ranks: RankPool, tmp_path: Path) -> None:
    for name, beside in (("waited", "false"), ("beside", "true")):
        ranks.run(save_in_the_background_and_train_on, 2, str(tmp_path / name), beside)
    saved = {name: pointer.whole_ones(tmp_path / name / "checkpoints") for name in ("waited", "beside")}
    assert [p.name for p in saved["beside"]] == [f"step_{s:08d}" for s in (1, 2, 3, 4)]
    seen = []
    for one, other in zip(saved["waited"], saved["beside"], strict=True):
        a, b = contents(one), contents(other)
        tensors = [name for name in a if name.endswith(".distcp")]
        assert tensors
        assert {n: a[n] for n in tensors} == {n: b[n] for n in tensors}
        verify_checksums(other)
        seen.append({n: a[n] for n in tensors})
    assert all(a[n] != b[n] for a, b in pairwise(seen) for n in a)


@pytest.mark.parametrize("beside", long_but(["false", "true"], "true"))
def test_a_full_disk_costs_a_warning_and_the_run_goes_on(ranks: RankPool, tmp_path: Path, beside: str) -> None:
    settings = [*TINY, "checkpoint.save_steps=2", f"checkpoint.asynchronous={beside}"]
    unbroken = ranks.run(run_stage, 2, str(tmp_path / "a"), *settings, "topology.dp=2")
    with small_disk(tmp_path / "disk", 200) as disk:
        run_dir = str(disk / "run")
        root = disk / "run" / "checkpoints"
        ranks.run(run_stage, 2, run_dir, *settings, "topology.dp=2", "train.stop_after=2")
        filler = fill(disk, leave_mebibytes=3)
        outcomes = ranks.run(outcome_of, 2, run_dir, *settings, "topology.dp=2")
        assert all("step 6 cannot be saved" in text and "GiB are free" in text for text in outcomes), outcomes
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step_00000002"]
        verify_checksums(root / "step_00000002")
        filler.unlink()
        resumed = ranks.run(run_stage, 2, run_dir, *settings, "topology.dp=2")
        assert same(unbroken, resumed)
        assert metrics(tmp_path / "a") == metrics(disk / "run")


def write_without_room(run_dir: str, beside: bool, read_only: str = "") -> str:
    """A save that believes there is room, on a disk where there is none or (`read_only`) that turns read-only."""
    from megalong.checkpoint.save import Saving
    from megalong.runtime.errors import CheckpointError
    from megalong.training.state import contents_of
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, *TINY, "topology.dp=2")
    if read_only:
        if stage.claim is not None:
            stage.claim.release()  # Linux does not remount a disk on which a file is open for writing
            make_read_only(Path(read_only))
        dist.barrier()
    try:
        state, record = stage.state, contents_of(stage.state, stage.settings)
        Saving(stage.saver.root, 1, state.model, state.optimizer, record, beside=beside).commit()
    except CheckpointError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fills_up_while_it_is_written_leaves_nothing(ranks: RankPool, tmp_path: Path, beside: bool) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        (disk / "run").mkdir()
        fill(disk, leave_mebibytes=3)
        for text in ranks.run(write_without_room, 2, str(disk / "run"), beside):
            assert "No space left on device" in text
            assert "The newest whole checkpoint is none" in text
        assert list((disk / "run" / "checkpoints").iterdir()) == []


def test_a_disk_that_cannot_be_written_is_told_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 200) as disk:
        try:
            texts = ranks.run(write_without_room, 2, str(disk / "run"), False, str(disk))
            assert all("cannot be saved" in text and "Read-only file system" in text for text in texts), texts
            texts = ranks.run(outcome_of, 2, str(disk / "run"), *TINY, "topology.dp=2")
            assert all("cannot be used as a folder to write to: Read-only" in text for text in texts), texts
        finally:
            make_read_only(disk, False)


def test_room_is_asked_for_before_anything_starts(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 10) as disk:
        settings = ["+stage=65k", "+scale=mini", f"run_dir={disk / 'a' / 'run'}", "train.steps=9"]
        check_disk_space(run_of([*settings, "checkpoint.save_steps=3"], 1), 3 * 2**20)
        with pytest.raises(ConfigError, match=r"0\.01 GiB free.*checkpoint\.keep=3"):
            check_disk_space(run_of([*settings, "checkpoint.save_steps=1", "checkpoint.keep=3"], 1), 3 * 2**20)
        check_disk_space(run_of([*settings, "checkpoint.save_steps=0", "checkpoint.keep=3"], 1), 9 * 2**20)


def test_a_save_is_due_by_minutes_as_well(ranks: RankPool, tmp_path: Path) -> None:
    often = ["checkpoint.save_steps=0", "checkpoint.save_minutes=0.000001", "checkpoint.keep=99"]
    ranks.run(run_stage, 2, str(tmp_path), *TINY, "train.stop_after=3", *often, "topology.cp=2")
    assert len(pointer.whole_ones(tmp_path / "checkpoints")) == 3


def pointer_before_the_name(run_dir: str) -> str:
    """What `latest` says when the files of the second save are written and its folder has no name yet."""
    from megalong.checkpoint import save
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, *TINY, "checkpoint.save_steps=1", "train.stop_after=2")
    commit, seen = save.commit_folder, []

    def look(partial: Path, target: Path) -> None:
        if target.name == "step_00000002":
            seen.append((stage.saver.root / pointer.POINTER).read_text().strip())
        commit(partial, target)

    save.commit_folder = look
    try:
        stage.run()
    finally:
        save.commit_folder = commit
    return seen[0]


def test_the_pointer_moves_only_to_what_is_whole(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(pointer_before_the_name, 1, str(tmp_path)) == ["step_00000001"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000002"


def test_the_checkpoint_at_the_end_of_the_stage_stays(ranks: RankPool, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    ranks.run(run_stage, 1, str(tmp_path), *TINY, "train.steps=2")
    longer = ["train.steps=5", "checkpoint.save_steps=1", "checkpoint.keep=1"]
    ranks.run(run_stage, 1, str(tmp_path), *TINY, *longer, "checkpoint.allow_changed=[train.steps]")
    assert [p.name for p in pointer.whole_ones(root)] == ["step_00000005"]
    ranks.run(run_stage, 1, str(tmp_path / "b"), *TINY, "train.steps=4", "checkpoint.save_steps=1", "checkpoint.keep=1")
    assert [p.name for p in pointer.whole_ones(tmp_path / "b" / "checkpoints")] == ["step_00000004"]
