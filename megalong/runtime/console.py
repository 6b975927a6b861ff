"""What reaches the console? One voice (rank 0), and one line for what libraries complain about on import."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TextIO

_speaks = True
_aside: Callable[[], AbstractContextManager[Any]] = nullcontext


def speak_only_from(first: bool) -> None:
    """Let only rank 0 speak; the rest stay silent."""
    global _speaks
    _speaks = first


def write_aside(aside: Callable[[], AbstractContextManager[Any]]) -> None:
    """Print every line inside a context of `aside` from now on: it takes away what is drawn at the terminal's foot."""
    global _aside
    _aside = aside


def say(text: str = "") -> None:
    """Print a line from rank 0, at once (output of a Slurm job is followed live)."""
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Print a warning from rank 0 to stderr."""
    _print(f"WARNING: {text}", sys.stderr)


def shout(text: str) -> None:
    """Write a line from rank 0 to stderr past Python's buffers, from any thread."""
    if _speaks:
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())


def _print(text: str, stream: TextIO) -> None:
    """A terminal that was closed, or a log file on a full disk, does not end a run."""
    if _speaks:
        with contextlib.suppress(OSError, ValueError), _aside():  # ValueError: the stream is closed
            print(text, file=stream, flush=True)


@contextmanager
def gathered_notices(title: str) -> Iterator[None]:
    """Collect Python warnings and log records of a block; rank 0 then says in one line what they were about. That an
    optional package is not installed is left out: the run says itself what does its work (`recipe.parts`)."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    root, keep = logging.getLogger(), Keep(logging.WARNING)
    root.addHandler(keep)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        root.removeHandler(keep)
    texts = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)] + records
    about = [subject for text in texts if not (subject := _subject(text)).endswith("not installed")]
    if about:
        what = f"{len(about)} notices" if len(about) > 1 else "1 notice"
        say(f"{title}: {what} ({'; '.join(sorted(set(about)))})")


def quiet_libraries() -> None:
    """Once imported, torch and megatron-core warn of deprecations and missing extras at every first use; no longer."""
    for module in (r"torch\.", r"megatron\."):
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def _subject(text: str) -> str:
    """The gist of a notice: what is missing, or its first words."""
    for word in ("Transformer Engine and Apex", "Transformer Engine", "Apex", "transformer_engine", "flash"):
        if word in text:
            return f"{word} not installed" if "not installed" in text or "not found" in text else word
    return " ".join(text.split()[:6])


def settle() -> None:
    """Before the process ends: what cannot be printed any more is given up; else Python turns exit code 0 into 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
