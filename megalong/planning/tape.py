"""How high does memory rise when tensors come and go? A tape of allocations and releases, without the tensors."""

from __future__ import annotations

from collections import defaultdict


class Tape:
    """Plays allocations in the order in which a program makes them, and remembers the highest point.

    Bytes are booked under a term (what a report calls them), so that the highest point can be taken apart.
    """

    def __init__(self) -> None:
        self.live = 0
        """Bytes held now."""
        self.peak = 0
        """Most bytes held so far."""
        self.at_peak: dict[str, int] = {}
        """Bytes by term when the peak was reached."""
        self._terms: dict[str, int] = defaultdict(int)
        self._tensors: dict[int, tuple[str, int]] = {}
        self._next = 0

    def take(self, term: str, size: float) -> int:
        """Allocate `size` bytes; returns a handle for `drop`."""
        size = int(size)
        self._next += 1
        self._tensors[self._next] = (term, size)
        self._terms[term] += size
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.at_peak = {name: held for name, held in self._terms.items() if held}
        return self._next

    def drop(self, *handles: int) -> None:
        """Release what `take` gave; 0 stands for nothing."""
        for handle in handles:
            if handle:
                term, size = self._tensors.pop(handle)
                self._terms[term] -= size
                self.live -= size

    def move(self, term: str, *handles: int) -> None:
        """Book tensors under another term: working memory that turned out to be kept."""
        for handle in handles:
            if handle:
                old, size = self._tensors[handle]
                self._terms[old] -= size
                self._terms[term] += size
                self._tensors[handle] = (term, size)
