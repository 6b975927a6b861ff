"""What did a step do, operator by operator? `train.profile=[3,4]` writes a trace of those steps for Perfetto.

`run_dir/profile/step<n>-rank<r>.json` is the Chrome JSON of torch's profiler: open it at https://ui.perfetto.dev or
chrome://tracing. A step that is profiled is slower than others. Like other logs, a trace that cannot be written ends no
run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch.distributed as dist

from megalong.run import Run
from megalong.runtime import device
from megalong.runtime.console import say, warn
from megalong.runtime.files import partial_of


def trace_of(run: Run, step: int) -> Path:
    """Where the trace of a step of this rank is written."""
    return run.run_dir / "profile" / f"step{step}-rank{dist.get_rank()}.json"


def profiling(run: Run, step: int) -> AbstractContextManager[None]:
    """The context in which to run a step: it is profiled if it was asked for.

    Args:
        step: counted from 1.
    """
    train = run.config.train
    asked = step in (train.profile or ()) and dist.get_rank() in train.profile_ranks
    return _profiled(trace_of(run, step)) if asked else nullcontext()


@contextmanager
def _profiled(target: Path) -> Iterator[None]:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.on_cuda() else [])]
    with profile(activities=activities, record_shapes=True) as found:
        yield
        device.synchronize()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = partial_of(target)
        found.export_chrome_trace(str(aside))
        os.replace(aside, target)
        say(f"profile of the step: {target}")
    except (OSError, RuntimeError) as error:
        warn(f"the profile {target} cannot be written: {getattr(error, 'strerror', None) or error}")
