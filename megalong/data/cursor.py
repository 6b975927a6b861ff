"""A run's place in its data is the number of samples consumed by all ranks together: no change of layout moves it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from megalong.data.windows import Windows
from megalong.runtime.errors import DataError


@dataclass(frozen=True)
class Cursor:
    """A position in the global order of samples."""

    consumed_samples: int = 0
    """Sequences that all data-parallel ranks together have trained on."""
    fingerprint: str = ""
    """Which data they came from; see `Windows.fingerprint`."""
    by_window: tuple[int, ...] = ()
    """The same of each window, in the order of `Windows.parts`; empty where there is one."""

    @staticmethod
    def at_start(data: Windows) -> Cursor:
        """Nothing of `data` consumed yet."""
        return Cursor(0, data.fingerprint, (0,) * len(data.parts) if len(data.parts) > 1 else ())

    def advance(self, samples: int, part: int = 0) -> Cursor:
        """The position after `samples` more samples (the global batch size, once a step is done) of a window."""
        assert samples >= 0
        by_window = tuple(n + samples * (i == part) for i, n in enumerate(self.by_window))
        return replace(self, by_window=by_window, consumed_samples=self.consumed_samples + samples)

    def consumed_of(self, part: int) -> int:
        """Samples consumed of one window."""
        return self.by_window[part] if self.by_window else self.consumed_samples

    def moved_to(self, data: Windows, step: int) -> Cursor:
        """The position after as many steps in other data, as if they had read that."""
        batch = self.consumed_samples // max(1, step)
        by_window = tuple(batch * steps for steps in data.steps_of(step)) if len(data.parts) > 1 else ()
        return replace(self, fingerprint=data.fingerprint, by_window=by_window)

    def require(self, data: Windows) -> None:
        """Check that the position is one in `data`.

        Raises:
            DataError: it was taken in other data, where the same number means other samples.
        """
        if self.fingerprint != data.fingerprint:
            raise DataError(
                f"The run being resumed has read {self.consumed_samples:,} sequences of data {self.fingerprint}, and "
                f"{data.folder} is data {data.fingerprint}. Give the folder that the run began with (data.path), "
                "or start a new run_dir."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        said = asdict(self) | {"by_window": list(self.by_window)}
        if not self.by_window:
            del said["by_window"]
        return said

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Cursor:
        """Inverse of `state_dict`."""
        return Cursor(**state | {"by_window": tuple(state.get("by_window", ()))})
