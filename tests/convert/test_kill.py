"""A conversion that is killed leaves nothing under the final name, and the next run gives the right bytes."""

import pytest

from tests.convert.kills import DIRECTIONS, kill_conversions


@pytest.mark.parametrize("direction", list(DIRECTIONS))
def test_a_killed_conversion_leaves_no_target_and_can_be_run_again(tmp_path, direction):
    kill_conversions(tmp_path, direction, interruptions=2, seed=0)
