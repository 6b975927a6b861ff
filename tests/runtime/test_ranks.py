"""The pool of CPU ranks: fresh groups of any size, failures with their traceback, recovery afterwards."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megalong.runtime.ranks import RankFailed, RankPool


def add_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()
    return 0


def die() -> None:
    os._exit(1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_task_runs_in_a_group_of_the_size_asked_for(ranks: RankPool, world_size: int) -> None:
    expected = sum(range(world_size)) + world_size
    assert ranks.run(add_ranks, world_size, 1) == [expected] * world_size


def gloo_threads() -> int:
    """Threads of this process that serve a gloo group."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("gloo_tcp_loop") for name in names)


def leave_groups_in_a_circle() -> None:
    circle: list = [dist.new_group() for _ in range(3)]
    circle.append(circle)


def test_groups_that_a_task_leaves_behind_do_not_stay(ranks: RankPool) -> None:
    before = ranks.run(gloo_threads, 2)
    ranks.run(leave_groups_in_a_circle, 2)
    assert ranks.run(gloo_threads, 2) == before


def test_a_rank_that_raises_is_reported_with_its_traceback() -> None:
    with RankPool() as pool:
        with pytest.raises(RankFailed, match=r"rank 1 of 2 raised(.|\n)*ValueError: planted"):
            pool.run(fail_on, 2, 1)
        assert pool.run(add_ranks, 1, 0) == [0]


def test_a_rank_that_dies_is_reported() -> None:
    with RankPool() as pool, pytest.raises(RankFailed, match="died"):
        pool.run(die, 1)
