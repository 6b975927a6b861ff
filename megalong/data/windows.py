"""Which window each optimizer step reads follows from the number of the step and from what the data folder says.

A data folder may name others beside its own sequences (`Manifest.others`), of shorter windows, each an ordinary data
folder. Whole steps alternate between them, as many of each in every round as the manifest says, spread evenly.

A sample always has as many tokens as the stage's window: it is one sequence of it, or so many shorter ones, packed,
which attention keeps apart as it keeps documents apart. So shapes, micro-batches, pipeline schedule, tokens of a step
and what context-parallel ranks hold are the same in every step, a shorter window asks nothing new of the layout, and a
rank of a million-token run is not given a few tokens at a time. Rotary phases are relative, so a sequence inside a
sample is rotated as one of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megalong.data.alternation import alternation, steps_of
from megalong.data.dataset import SequenceDataset, open_dataset
from megalong.data.manifest import MANIFEST_NAME
from megalong.runtime.errors import DataError
from megalong.runtime.files import sha256_of


@dataclass(frozen=True)
class Part:
    """The sequences of one window."""

    dataset: SequenceDataset
    rows: int = 1
    """Sequences of a sample."""
    steps: int = 1
    """Of a round."""

    @property
    def window(self) -> int:
        """Tokens of a sequence."""
        return self.dataset.seq_length


@dataclass(frozen=True)
class Windows:
    """What a split of a data folder has to read, the stage's own window first."""

    parts: tuple[Part, ...]

    @staticmethod
    def of(dataset: SequenceDataset) -> Windows:
        """A folder of one window."""
        return Windows((Part(dataset),))

    @property
    def main(self) -> SequenceDataset:
        """The sequences of the stage's window."""
        return self.parts[0].dataset

    @property
    def folder(self) -> Path:
        """The data folder."""
        return self.main.folder

    @cached_property
    def fingerprint(self) -> str:
        """Identity of what is read in which step: equal fingerprints, equal samples in equal steps."""
        if len(self.parts) == 1:
            return self.main.fingerprint
        content = [(part.dataset.fingerprint, part.rows, part.steps) for part in self.parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def part_of(self, step: int) -> int:
        """Which part step `step` reads, counted from 0."""
        return self._round[step % len(self._round)]

    def steps_of(self, steps: int) -> list[int]:
        """Of the first `steps` steps, how many read each part."""
        return steps_of([part.steps for part in self.parts], steps)

    @cached_property
    def _round(self) -> list[int]:
        return alternation([part.steps for part in self.parts])


def open_windows(
    folder: Path | str,
    split: str,
    *,
    seq_length: int,
    vocab_size: int,
    min_samples: int = 1,
    verify: bool | None = None,
) -> Windows:
    """Open a split of a data folder with all its windows, or say why it does not fit the run.

    Args:
        seq_length: window of the run, tokens.
        vocab_size: rows of the model's embedding.
        min_samples: fewest samples that the run can do with; of a shorter window's held-out sequences one is enough.
        verify: see `open_dataset`.

    Raises:
        DataError: see `open_dataset`; also a window beside the run's own that does not divide it, or a folder that is
            not the one that was written there.
    """
    main = open_dataset(
        folder, split, seq_length=seq_length, vocab_size=vocab_size, min_sequences=min_samples, verify=verify
    )
    parts = [Part(main, 1, main.manifest.steps)]
    for other in main.manifest.others:
        place = main.folder / other.folder
        if (place / MANIFEST_NAME).is_file() and sha256_of(place / MANIFEST_NAME) != other.sha256:
            raise DataError(
                f"{place} is not what {main.folder} was made with: its {MANIFEST_NAME} has changed. "
                "Prepare or copy the data again."
            )
        rows = seq_length // other.seq_length
        dataset = open_dataset(
            place,
            split,
            seq_length=other.seq_length,
            vocab_size=vocab_size,
            min_sequences=min_samples * rows if split == "train" else 1,
            verify=verify,
        )
        parts.append(Part(dataset, rows, other.steps))
    return Windows(tuple(parts))
