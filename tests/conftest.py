"""One pool of CPU ranks for all tests of a process, and the order in which files begin."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from megalong.runtime.ranks import RankPool
from tests.installing import build, install

# Before torch is imported: threads that wait for one another by spinning take the processors from the other ranks, here
# and in all that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("megalong", deadline=None)  # a busy machine is slow, and nothing timed is asserted
settings.load_profile("megalong")

# Begun first, longest first: where files run side by side, one that takes minutes must not be the last.
EARLY = (
    "slurm/test_jobs.py",
    "slurm/test_chain.py",
    "training/test_kills.py",
    "training/test_parity.py",
    "training/test_recompute.py",
    "planning/test_memory.py",
    "training/test_whole_steps.py",
    "training/test_signals.py",
    "recipe/test_command_line.py",
    "training/test_resume.py",
    "slurm/test_rendering.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    early = {Path(__file__).parent / name: place for place, name in enumerate(EARLY)}
    items.sort(key=lambda item: early.get(item.path, len(EARLY)))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of the checkout's files, and of the source distribution that these make."""
    return build(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="session")
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed package and its programs in bin/."""
    return install(wheels[1], tmp_path_factory.mktemp("installed"))
