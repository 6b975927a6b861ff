"""Does the suite notice? Plants faults in a copy of the project, one by one, and names the test that catches each.

A test proves what it asserts, not what its name says. tests/mutants.toml lists faults that were once, or could be,
silent: the file, the sound text, the faulty text, and the test that must fail. A few minutes on two cores.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutants.toml"


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    name: str
    file: str
    """Relative to the project."""
    sound: str
    """Text that stands exactly once in the file."""
    fault: str
    """What takes its place."""
    test: str
    """pytest's name of a test that fails then, or of the file that holds it."""

    def planted_in(self, text: str) -> str:
        """The file with the fault.

        Raises:
            ValueError: the sound text is not there exactly once: the list is out of date.
        """
        if text.count(self.sound) != 1 or self.sound == self.fault:
            raise ValueError(f"{self.name}: its text stands {text.count(self.sound)} times in {self.file}, not once")
        return text.replace(self.sound, self.fault)


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    mutant: Mutant
    caught_by: str | None
    """The test that failed; None: no test did."""
    seconds: float


def read_mutants(path: Path = LIST) -> list[Mutant]:
    """The list, in order."""
    return [Mutant(**entry) for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]]


def main(
    only: Annotated[str, typer.Option(help="Faults whose name holds this text.")] = "",
    jobs: Annotated[int, typer.Option(help="Copies that are tested side by side.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for one fault; a test that hangs has noticed it too.")] = 240,
) -> None:
    """Plant every fault of tests/mutants.toml and print which test catches it.

    Exit code 0 only if all are caught.

    Example: python tools/mutants.py --only theta
    """
    mutants = [m for m in read_mutants() if only in m.name]
    for mutant in mutants:
        mutant.planted_in((ROOT / mutant.file).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="megalong-mutants-") as folder, ThreadPoolExecutor(jobs) as workers:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            copies.put(_copy(Path(folder) / str(number)))
        sound = _run(Path(folder) / "0", sorted({m.test for m in mutants}), timeout=3600)
        if sound is not None:
            typer.echo(f"{sound} fails without any fault: mend it first", err=True)
            raise typer.Exit(2)
        print("| fault | file | caught by | seconds |\n|---|---|---|---|", flush=True)
        missed = 0
        for outcome in workers.map(lambda m: _try(m, copies, timeout), mutants):
            mutant = outcome.mutant
            found = f"`{outcome.caught_by}`" if outcome.caught_by else "**nothing**"
            print(f"| {mutant.name} | `{mutant.file}` | {found} | {outcome.seconds:.0f} |", flush=True)
            missed += outcome.caught_by is None
    print(f"\n{len(mutants) - missed} of {len(mutants)} faults caught")
    raise typer.Exit(1 if missed else 0)


def _copy(target: Path) -> Path:
    """The project's files as they are now, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def _try(mutant: Mutant, copies: SimpleQueue[Path], timeout: float) -> Outcome:
    copy = copies.get()
    begun = time.monotonic()
    try:
        with _planted(copy, mutant):
            return Outcome(mutant, _run(copy, [mutant.test], timeout), time.monotonic() - begun)
    finally:
        copies.put(copy)


@contextmanager
def _planted(copy: Path, mutant: Mutant) -> Iterator[None]:
    file = copy / mutant.file
    before = file.read_text(encoding="utf-8")
    file.write_text(mutant.planted_in(before), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(before, encoding="utf-8")


def _run(copy: Path, tests: list[str], timeout: float) -> str | None:
    """The first test that fails; None where none does."""
    # without cached bytecode: a fault of the same length in the same second would not be seen
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"{tests[0]} (hangs)"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::[^\[\s]+|\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise RuntimeError(f"{' '.join(tests)} ended with code {done.returncode}:\n{done.stdout}{done.stderr}")
    return failed[1]


if __name__ == "__main__":
    typer.run(main)
