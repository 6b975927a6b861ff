"""What looks at every finished step: non-finite steps, loss spikes, slow ranks, the plan beside what happened."""

from __future__ import annotations

import os
from typing import Protocol

import torch.distributed as dist

from megalong.run import Run
from megalong.training.agreement import Agreement
from megalong.training.beside import Beside
from megalong.training.finite import FiniteSteps, GradientWatch
from megalong.training.spikes import LossWatch
from megalong.training.state import State
from megalong.training.steps import Done
from megalong.training.stragglers import Stragglers


class Watcher(Protocol):
    """Looks at finished steps, the same ones on every rank."""

    prefix: str
    """How its scalars' tags begin."""

    def look(self, done: Done, word: Agreement) -> dict[str, float]:
        """Say what is wrong with a step, and raise where the run must not go on.

        Args:
            word: what all ranks said of it.

        Returns:
            scalars for TensorBoard.
        """
        ...


def watchers(run: Run, state: State, beside: Beside) -> list[Watcher]:
    """Those of a run, in the order in which they look; every rank calls this."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, os.uname().nodename)
    return [
        FiniteSteps(run.config.train, GradientWatch(state.model), state.skipped),
        LossWatch(),
        # documents of unequal lengths give ranks unequal work
        Stragglers(hosts, even=run.config.attention.document_mask == "none", window=run.seq_length),
        beside,
    ]
