"""A save against a plain sequential write of the same bytes, and how long training waits for it.

Real megatron ranks save a real model and optimizer. In each repetition the plain write comes right before and after the
save: as many processes as ranks each write and sync their share of the same bytes into one file. Loading a checkpoint
starts by reading every byte; that is timed as well.

  python benchmarks/checkpoint.py [ranks=2] [repeats=3] [layers=8] [hidden=1024]

The last line of stdout is a JSON object: `throughput_ratio` (plain seconds / save seconds; limit 0.5), the training's
waiting time for a save that is waited for and for one that is written beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from megalong.runtime.ranks import RankPool  # noqa: E402


def measure(folder: str, layers: int, hidden: int, repeats: int) -> list[dict[str, float]]:
    """On each rank: saves of one model, each between two plain writes of the same bytes."""
    import torch.distributed as dist

    from megalong.checkpoint.load import verify_checksums
    from megalong.checkpoint.save import Saving
    from megalong.planning.plan import plan_of
    from megalong.recipe.resolve import run_of
    from megalong.topology.groups import initialize
    from megalong.training.loop import StageRun
    from megalong.training.sequences import open_data
    from megalong.training.start import plan_start
    from megalong.training.state import contents_of

    world = dist.get_world_size()
    run = run_of(
        [
            "+stage=65k",
            "+scale=mini",
            f"topology.dp={world}",
            f"run_dir={folder}/run",
            f"model.num_hidden_layers={layers}",
            f"model.hidden_size={hidden}",
            f"model.intermediate_size={3 * hidden}",
            f"train.global_batch_size={world}",
            "data.eval_sequences=0",
        ],
        world,
    )
    start = plan_start(run)
    run, data = open_data(run, [])
    initialize(run.layout)
    stage = StageRun(run, plan_of(run), start, data)
    state = stage.state
    found = []
    for repeat in range(repeats + 1):
        row: dict[str, float] = {}
        for beside in (False, True):
            shutil.rmtree(stage.saver.root, ignore_errors=True) if stage.first else None
            dist.barrier()
            begun = time.perf_counter()
            saving = Saving(
                stage.saver.root, repeat, state.model, state.optimizer, contents_of(state, run), beside=beside
            )
            waited = time.perf_counter() - begun
            while not saving.written:
                time.sleep(0.01)
            dist.barrier()
            again = time.perf_counter()
            size = saving.commit()
            waited += time.perf_counter() - again
            name = "beside" if beside else "waited"
            row[f"{name}_s"] = time.perf_counter() - begun
            row[f"{name}_blocked_s"] = waited
            if not beside:
                sizes: list[Any] = [None] * world
                dist.all_gather_object(sizes, size)
                row["bytes"] = max(sizes)
                row["plain_s"] = plain_write(Path(folder), int(row["bytes"]) // world)
                begun = time.perf_counter()
                verify_checksums(saving.target)
                dist.barrier()
                row["verify_s"] = time.perf_counter() - begun
        if repeat:  # the first one warms up
            found.append(row)
    return found


def plain_write(folder: Path, share: int) -> float:
    """Seconds in which all ranks write and sync `share` bytes each, in pieces of 16 MiB."""
    import torch.distributed as dist

    piece = os.urandom(2**24)
    path = folder / f"plain-{dist.get_rank()}"
    dist.barrier()
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for offset in range(0, share, len(piece)):
            file.write(piece[: min(len(piece), share - offset)])
        os.fsync(file.fileno())
    dist.barrier()
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def main(ranks: int, repeats: int, layers: int, hidden: int) -> dict[str, object]:
    """Measure, and take medians over repetitions."""
    with tempfile.TemporaryDirectory() as folder, RankPool() as pool:
        rows = pool.run(measure, ranks, folder, layers, hidden, repeats, timeout_s=1200)[0]
    for row in rows:
        print(
            f"{row['bytes'] / 2**20:,.0f} MiB: saved in {row['waited_s']:.2f} s, plain write {row['plain_s']:.2f} s; "
            f"beside the training {row['beside_s']:.2f} s, of which it waited {row['beside_blocked_s']:.2f} s",
            flush=True,
        )

    def median(what: Any) -> float:
        return float(statistics.median(what(row) for row in rows))

    return {
        "ranks": ranks,
        "MiB": rows[0]["bytes"] / 2**20,
        "throughput_ratio": median(lambda r: r["plain_s"] / r["waited_s"]),
        "saved_MiB_per_s": median(lambda r: r["bytes"] / 2**20 / r["waited_s"]),
        "plain_MiB_per_s": median(lambda r: r["bytes"] / 2**20 / r["plain_s"]),
        "blocked_s_waiting": median(lambda r: r["waited_blocked_s"]),
        "blocked_s_beside": median(lambda r: r["beside_blocked_s"]),
        "beside_s": median(lambda r: r["beside_s"]),
        "verify_MiB_per_s": median(lambda r: r["bytes"] / 2**20 / r["verify_s"]),
    }


if __name__ == "__main__":
    options = {key: int(value) for key, value in (argument.split("=", 1) for argument in sys.argv[1:])}
    keys = {"ranks": 2, "repeats": 3, "layers": 8, "hidden": 1024} | options
    print(json.dumps(main(keys["ranks"], keys["repeats"], keys["layers"], keys["hidden"])))
