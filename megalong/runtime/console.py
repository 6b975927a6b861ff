"""What reaches the console? One voice (rank 0), and one line for what libraries complain about on import."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_speaks = True


def speak_only_from(first: bool) -> None:
    """Let only rank 0 speak; the rest stay silent."""
    global _speaks
    _speaks = first


def say(text: str = "") -> None:
    """Print a line from rank 0, at once (output of a Slurm job is followed live)."""
    if _speaks:
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning from rank 0 to stderr."""
    if _speaks:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


@contextmanager
def gathered_notices(title: str) -> Iterator[None]:
    """Collect Python warnings and log records of a block; rank 0 then says in one line what they were about."""
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
    about = sorted({_subject(t) for t in texts})
    if about:
        say(f"{title}: {len(texts)} notices ({'; '.join(about)})")


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
