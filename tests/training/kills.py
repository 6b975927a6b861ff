"""Kill rounds: a run is killed at random moments, started again until it is done, and compared with the unbroken run.

  python tests/training/kills.py [rounds=30] [seed=0] [ranks=4] [output=table.md]

Each round: start the run on separate processes, wait for a random moment (a step, or while a checkpoint is being
written), send SIGKILL to one random rank or to all; all ranks must be gone by themselves within the timeout; then the
newest checkpoint must verify. Rounds go on in one run_dir; when the run comes to its end, its parameters, optimizer
state and metrics must be those of the unbroken run bit for bit, and a fresh run begins. The last line is a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from megalong.checkpoint import pointer  # noqa: E402
from megalong.checkpoint.checksums import Checksums  # noqa: E402
from tests.runtime.processes import WarmProcess, free_port, slurm_like  # noqa: E402
from tests.training.runs import metrics  # noqa: E402

HEARTBEAT_S = 8.0
JOIN_S = 20.0
GONE_WITHIN_S = 45.0  # importing and joining, or silence; verdict and exit, on a machine with more ranks than cores
STEPS = 16
SETTINGS = [
    "+stage=65k",
    "+scale=mini",
    "model.num_hidden_layers=2",
    "data.eval_sequences=0",
    "train.global_batch_size=4",
    "checkpoint.save_steps=2",
    f"train.heartbeat_s={HEARTBEAT_S}",
    f"train.join_s={JOIN_S}",
]
LAYOUTS = (["topology.tp=2", "topology.cp=2"], ["topology.cp=2", "topology.dp=2"], ["topology.pp=2", "topology.cp=2"])


@dataclass
class Round:
    """What happened in one round."""

    number: int
    layout: str
    victim: str
    moment: str
    resumed_from: int
    gone_after_s: float
    named: str
    newest: str
    ended: str = ""


class Run:
    """One run_dir and the processes that work in it.

    Args:
        warm: ranks find torch and megatron-core imported, which otherwise takes longer than all they do.
    """

    def __init__(self, run_dir: Path, ranks: int, layout: list[str], steps: int = STEPS, warm: bool = False) -> None:
        self.run_dir, self.ranks, self.layout, self.steps, self.warm = run_dir, ranks, layout, steps, warm
        self.processes: list[subprocess.Popen | WarmProcess] = []
        self.started_at = 0.0

    @property
    def root(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self) -> None:
        port = free_port()
        settings = [*SETTINGS, f"train.steps={self.steps}", *self.layout, f"run_dir={self.run_dir}"]
        command = ["megalong/pretrain.py", *settings]
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.processes, self.started_at = [], time.time()
        for rank in range(self.ranks):
            log, env = self.run_dir / f"rank{rank}.log", slurm_like(rank, self.ranks, port)
            log.write_text("")
            if self.warm:
                self.processes.append(WarmProcess(command, REPO, env, log))
                continue
            with log.open("ab") as file:
                words = [sys.executable, *command]
                self.processes.append(subprocess.Popen(words, cwd=REPO, env=env, stdout=file, stderr=subprocess.STDOUT))

    def steps_done(self) -> int:
        """Steps in the metrics, once this attempt has taken them over."""
        path = self.run_dir / "metrics.jsonl"
        mine = path.is_file() and path.stat().st_mtime > self.started_at
        return path.read_text().count("\n") if mine else 0

    def saving(self) -> bool:
        """Whether this attempt is writing a checkpoint."""
        try:
            return any(p.stat().st_mtime > self.started_at for p in self.root.glob("*.partial"))
        except FileNotFoundError:  # renamed between the two looks
            return False

    def alive(self) -> bool:
        return all(p.poll() is None for p in self.processes)

    def wait(self, timeout: float) -> float:
        """Seconds until all are gone; kills and raises when they are not within the timeout."""
        begun = time.monotonic()
        try:
            for process in self.processes:
                process.wait(max(0.1, begun + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            left = [r for r, p in enumerate(self.processes) if p.poll() is None]
            self.kill()
            raise AssertionError(f"ranks {left} were still there after {timeout:.0f} s:\n{self.logs()}") from None
        return time.monotonic() - begun

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def logs(self) -> str:
        return "\n".join((self.run_dir / f"rank{r}.log").read_text()[-1500:] for r in range(self.ranks))

    def finish(self) -> None:
        """Run to the end."""
        self.start()
        self.wait(600)
        assert [p.returncode for p in self.processes] == [0] * self.ranks, self.logs()


def tensors(folder: Path) -> dict[str, bytes]:
    """Model and optimizer of a checkpoint: the files that hold tensors, which are the same for the same layout."""
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.distcp"))}


def compare(broken: Run, unbroken: Run) -> None:
    """Raises where the two runs differ in a bit."""
    assert metrics(broken.run_dir) == metrics(unbroken.run_dir), "metrics differ"
    folders = [pointer.folder_of(r.root, r.steps) for r in (broken, unbroken)]
    assert tensors(folders[0]) == tensors(folders[1]), "parameters or optimizer state differ"


def one_round(run: Run, number: int, rng: random.Random) -> Round:
    """Start, kill, look."""
    before = pointer.newest(run.root)
    resumed = (pointer.step_of(before) or 0) if before else 0
    first = resumed
    run.start()
    everyone, in_save = rng.random() < 0.25, rng.random() < 0.5
    at_step = rng.randrange(first, min(run.steps, first + 6))
    delay = rng.random() * (0.15 if in_save else 0.6)
    victim = rng.randrange(run.ranks)
    deadline = time.monotonic() + 300
    while run.alive() and time.monotonic() < deadline:
        there = run.steps_done() > at_step or (at_step == first and rng.random() < 0.002)
        if there and (not in_save or run.saving()):
            break
        time.sleep(0.002)
    time.sleep(delay)
    moment = f"{'save' if run.saving() else 'step'} {run.steps_done()}"
    done = not run.alive()
    for rank, process in enumerate(run.processes):
        if (everyone or rank == victim) and process.poll() is None:
            process.send_signal(signal.SIGKILL)
    gone = run.wait(GONE_WITHIN_S + (300 if done else 0))
    named = next((line for line in run.logs().splitlines() if line.startswith("megalong: ")), "")
    if not everyone and not done:
        others = [p.returncode for r, p in enumerate(run.processes) if r != victim]
        assert all(code != 0 for code in others) or all(code == 0 for code in others), others
    newest = pointer.newest(run.root)
    if newest is not None:
        Checksums(newest).check_all()
    return Round(
        number,
        " ".join(run.layout).replace("topology.", ""),
        "all" if everyone else f"rank {victim}",
        "after the end" if done else moment,
        resumed,
        gone,
        named.split(" on host")[0].split(",")[0].split(":")[-1].strip(),
        newest.name if newest else "none",
    )


def main(rounds: int = 30, seed: int = 0, ranks: int = 4, steps: int = STEPS, warm: bool = False) -> list[Round]:
    """Rounds of kills; raises at the first that loses something."""
    rng = random.Random(seed)
    found: list[Round] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = 0
        while len(found) < rounds:
            layout = LAYOUTS[runs % len(LAYOUTS)]
            unbroken = Run(folder / f"unbroken-{runs % len(LAYOUTS)}", ranks, layout, steps, warm)
            if not unbroken.run_dir.exists():
                unbroken.finish()
            run = Run(folder / f"run-{runs}", ranks, layout, steps, warm)
            runs += 1
            while len(found) < rounds:
                found.append(one_round(run, len(found) + 1, rng))
                print(found[-1], flush=True)
                if found[-1].newest == f"step_{steps:08d}":
                    break
            run.finish()
            compare(run, unbroken)
            found[-1].ended = "bit-identical"
            print(f"run {runs}: bit-identical to the unbroken one", flush=True)
            shutil.rmtree(run.run_dir)
    return found


def table(rounds: list[Round]) -> str:
    """A table for docs/reliability.md."""
    lines = [
        "| round | layout | killed | while | started at | all gone after | named | newest sound | run |",
        "|" + "---|" * 9,
    ]
    for r in rounds:
        lines.append(
            f"| {r.number} | {r.layout} | {r.victim} | {r.moment} | {r.resumed_from} | {r.gone_after_s:.1f} s | "
            f"{r.named} | {r.newest} | {r.ended} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.environ.setdefault("PYTHONPATH", str(REPO))
    done = main(int(options.get("rounds", 30)), int(options.get("seed", 0)), int(options.get("ranks", 4)))
    if "output" in options:
        Path(options["output"]).write_text(table(done))
    slowest = max(r.gone_after_s for r in done)
    print(json.dumps({"rounds": len(done), "lost": 0, "slowest_exit_s": slowest, "timeout_s": GONE_WITHIN_S}))
