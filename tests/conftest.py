"""One pool of CPU ranks for the whole test run."""

from collections.abc import Iterator

import pytest

from megalong.runtime.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    with RankPool() as pool:
        yield pool
