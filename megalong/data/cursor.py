"""How far has a run read, in a form that no change of layout can invalidate? Global samples consumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from megalong.data.dataset import SequenceDataset
from megalong.runtime.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """A position in the global order of samples."""

    consumed_samples: int = 0
    """Sequences that all data-parallel ranks together have trained on."""
    fingerprint: str = ""
    """Which data they came from; see `Manifest.fingerprint`."""

    @staticmethod
    def at_start(dataset: SequenceDataset) -> Cursor:
        """Nothing of `dataset` consumed yet."""
        return Cursor(0, dataset.fingerprint)

    def advance(self, samples: int) -> Cursor:
        """The position after `samples` more sequences (the global batch size, once a step is done)."""
        assert samples >= 0
        return replace(self, consumed_samples=self.consumed_samples + samples)

    def require(self, dataset: SequenceDataset) -> None:
        """Check that the position is one in `dataset`.

        Raises:
            DataError: it was taken in other data, where the same number means other samples.
        """
        if self.fingerprint != dataset.fingerprint:
            raise DataError(
                f"The run being resumed has read {self.consumed_samples:,} sequences of data {self.fingerprint}, and "
                f"{dataset.folder} is data {dataset.fingerprint}. Give the folder that the run began with (data.path), "
                "or start a new run_dir."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Cursor:
        """Inverse of `state_dict`."""
        return Cursor(**state)
