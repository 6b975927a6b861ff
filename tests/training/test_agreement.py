"""After each step all ranks know the same; a slow one is named, and a jump of the loss is seen."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalong.runtime.ranks import RankPool
from megalong.training.agreement import Agreement, agree
from megalong.training.spikes import LossWatch
from megalong.training.stragglers import Stragglers


def differ() -> Agreement:
    rank = dist.get_rank()
    return agree(stop=rank == 1, save=rank == 0, written=rank != 2, kernel_seconds=1.0 + (rank == 2))


def test_what_one_rank_says_all_know(ranks: RankPool) -> None:
    found = ranks.run(differ, 3)
    assert found == [Agreement(True, True, False, (1.0, 1.0, 2.0))] * 3
    assert (found[0].slowest, found[0].slowest_over_median) == (2, 2.0)


def step(*seconds: float) -> Agreement:
    return Agreement(False, False, True, seconds)


def test_a_rank_is_named_once_when_it_has_been_slow_three_times_running() -> None:
    watch = Stragglers(["a", "b", "c", "d"])
    slow, even = step(1, 1.1, 1, 2), step(1, 1.1, 1, 1.2)
    assert [watch.slow(s) is not None for s in (slow, slow, even, slow, slow)] == [False] * 5
    sentence = watch.slow(slow)
    assert sentence is not None
    assert "rank 3 on host d is slow" in sentence
    assert "1.90 times the median" in sentence
    assert watch.slow(slow) is None


def test_ranks_that_take_turns_are_not_stragglers() -> None:
    watch = Stragglers(["a", "b", "c"])
    assert not any(watch.slow(s) for s in (step(2, 1, 1), step(1, 2, 1), step(1, 1, 2)) * 3)


def test_a_run_without_measured_kernels_has_no_straggler() -> None:
    assert step(0.0, 0.0).slowest_over_median == 1.0


def test_a_jump_of_the_loss_is_seen_and_a_slow_drift_is_not() -> None:
    watch = LossWatch()
    assert all(watch.jump(5.0 + 0.02 * (i % 3)) is None for i in range(10))
    jump = watch.jump(6.0)
    assert jump is not None
    assert 0.9 < jump < 1.1
    assert watch.jump(6.0) is not None  # the first one has not moved the median
    drift = LossWatch()
    assert all(drift.jump(5.0 + 0.1 * i) is None for i in range(40))


def test_nothing_is_called_a_jump_before_there_is_something_to_compare() -> None:
    watch = LossWatch()
    assert [watch.jump(x) for x in (1.0, 9.0, 2.0)] == [None] * 3


def with_a_slow_rank(run_dir: str, which: int) -> list[str]:
    """Sentences about stragglers in four real steps, in which one rank's kernels take 20 ms longer."""
    import time

    from megalong.attention.kernels import CpuFlash
    from tests.training.runs import stage_run

    stage = stage_run(run_dir, "topology.cp=2", "topology.dp=2", "train.stop_after=4", "checkpoint.save_steps=0")
    forward, slow, said = CpuFlash.forward, Stragglers.slow, []

    def slowed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **kwargs)

    def listened(watch: Stragglers, found: Agreement) -> str | None:
        sentence = slow(watch, found)
        said.extend([sentence] if sentence else [])
        return sentence

    Stragglers.slow = listened  # type: ignore[method-assign]
    if dist.get_rank() == which:
        CpuFlash.forward = slowed  # type: ignore[method-assign]
    try:
        stage.run()
    finally:
        CpuFlash.forward = forward  # type: ignore[method-assign]
        Stragglers.slow = slow  # type: ignore[method-assign]
    return said


def test_a_slow_rank_of_the_trainer_is_named_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(with_a_slow_rank, 4, str(tmp_path), 2)
    assert [len(said) for said in found] == [1] * 4
    assert all(said[0].startswith("rank 2 on host ") for said in found)
