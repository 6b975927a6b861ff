"""How is a job's end judged: is it over, or does the job start again? By the first rank that ended, and by progress.

srun reports the highest code of all ranks, which is that of a rank killed in consequence. So each rank notes how it
ended (slurm/rank.sh), the first note stays, and its code counts. A job that crashes a second time with the same newest
checkpoint is not started again: the trainer's own judgement (training/progress.py) may never be reached.

    python -m megalong.slurm.ending CODE --first-end FILE --run-dir DIR --notes FOLDER

says what happened and writes `FOLDER/ending-N` for start N of the job: `again` or `end`, and the job's exit code.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megalong.checkpoint.pointer import POINTER
from megalong.runtime.errors import EXIT_NO_PROGRESS, EXIT_OK, EXIT_SAVED_ON_SIGNAL, EXIT_USER_ERROR
from megalong.slurm.start import this_start


@dataclass(frozen=True)
class FirstEnd:
    """How the first rank that did not end well ended."""

    code: int
    rank: int
    node: str


@dataclass(frozen=True)
class Ending:
    """What follows for the job."""

    code: int
    """Its exit code, if it does not start again."""
    again: bool = False
    crashed: bool = False
    """Whether the next crash is compared with this one."""
    why: str = ""
    """Empty where the trainer has said it."""


def judge(code: int, newest: str, crashed_at: str | None) -> Ending:
    """Decide what a job does after its ranks have ended.

    Args:
        code: of the first rank that ended, or srun's where no rank could note it.
        newest: checkpoint of the run.
        crashed_at: newest checkpoint when the job crashed before; None if it has not.
    """
    if code in (EXIT_OK, EXIT_USER_ERROR, EXIT_NO_PROGRESS):
        return Ending(code)
    if code == EXIT_SAVED_ON_SIGNAL:
        return Ending(code, again=True, why="stopped by a signal and saved")
    if newest == crashed_at:
        why = f"crashed a second time with {newest} as its newest checkpoint: not started again"
        return Ending(EXIT_NO_PROGRESS, why=why)
    return Ending(code, again=True, crashed=True, why=f"crashed with code {code}, newest checkpoint: {newest}")


def read_first_end(path: Path) -> FirstEnd | None:
    """What `slurm/rank.sh` noted; None where all ranks ended well or none could write."""
    words = (_text(path) or "").split()
    return FirstEnd(int(words[0]), int(words[1]), words[2]) if len(words) == 3 else None


def _text(path: Path) -> str | None:
    """A note's text without the line's end; None where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return None


def main(arguments: list[str]) -> int:
    """Judge the end of a job's ranks, say it and write what follows.

    Returns:
        exit code.
    """
    parser = argparse.ArgumentParser(prog="ending")
    parser.add_argument("code", type=int, help="what srun ended with")
    parser.add_argument("--first-end", type=Path, required=True, help="file with the first rank's note")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True, help="folder of the job's own notes")
    options = parser.parse_args(arguments)
    start, code = this_start(), options.code
    if first := read_first_end(options.first_end):
        code, log = first.code, options.notes / f"rank-{first.rank}.log"
        print(start.says(f"rank {first.rank} on {first.node} was the first to end with code {code}, see {log}"))
    newest = _text(options.run_dir / "checkpoints" / POINTER)
    newest = "none" if newest is None else newest
    ending = judge(code, newest, _text(options.notes / "crashed-at"))
    if ending.why:
        print(start.says(ending.why))
    if ending.crashed:
        (options.notes / "crashed-at").write_text(f"{newest}\n", encoding="utf-8")
    line = f"{'again' if ending.again else 'end'} {ending.code}\n"
    (options.notes / f"ending-{start.restarts}").write_text(line, encoding="utf-8")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
