"""The short version of `kills.py`, and a rank of the real trainer that is stopped instead of killed."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.training import kills


@pytest.mark.long
def test_a_killed_run_loses_nothing() -> None:
    rounds = kills.main(rounds=1, seed=3, steps=8, warm=True)
    assert rounds[-1].ended == "bit-identical"
    assert all(r.gone_after_s < kills.GONE_WITHIN_S for r in rounds)


def test_a_stopped_rank_of_the_trainer_is_named_within_the_timeout(tmp_path: Path) -> None:
    run = kills.Run(tmp_path, 4, ["topology.tp=2", "topology.cp=2"], warm=True)
    run.start()
    try:
        while run.steps_done() < 2:
            assert run.alive(), run.logs()
            time.sleep(0.05)
        victim = random.Random(0).randrange(1, 4)
        run.processes[victim].send_signal(signal.SIGSTOP)
        stopped, run.processes = run.processes[victim], [p for r, p in enumerate(run.processes) if r != victim]
        try:
            run.wait(kills.GONE_WITHIN_S)
        finally:
            stopped.kill()
        assert [p.returncode for p in run.processes] == [1, 1, 1]
        errors = run.logs()
        assert errors.count("megalong: ") == 1
        assert f"lost rank {victim} on host " in errors
        assert ", step " in errors
    finally:
        run.kill()
