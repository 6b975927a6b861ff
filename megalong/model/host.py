"""Where do activations wait that the device has no room for? In pinned host memory, copied beside the computation.

What a layer keeps for its backward pass leaves on a stream of its own while the next layer computes, and comes back on
another while the layer after it goes backward. The device holds what two neighbouring layers keep, not all of them: of
the one that computes, and of the one that leaves or arrives. The last layer's never leave, since backward begins there.

The host holds as many bytes in pinned buffers of PyTorch's caching allocator (which rounds them up to powers of two and
keeps them for the next step). Values are copied, so every bit of a result is the same. On the CPU the same code copies
to other buffers; `runtime/device.py` stands in for streams there.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalong.runtime import device


class Parked:
    """Tensors of one layer and micro-batch, on their way to the host or back; they are handed out once.

    Args:
        here: on the device; theirs until `leave`.
        before: those of the layer below, wanted next in backward; None: this is the rank's first layer.
    """

    def __init__(self, streams: tuple[Any, Any], here: Sequence[Tensor], before: Parked | None) -> None:
        self._outward, self._inward = streams
        self._here, self._before = list(here), before
        self._outward.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._outward):
            self._there = [torch.empty_like(x, device="cpu", pin_memory=True) for x in here]
            for x, there in zip(here, self._there, strict=True):
                there.copy_(x, non_blocking=True)
            self._copied = self._outward.record_event()

    def leave(self) -> None:
        """Give up the tensors on the device: what computes from now on may use their memory."""
        torch.cuda.current_stream().wait_event(self._copied)
        self._here = []

    def fetch(self) -> None:
        """Start the copy back, unless the tensors are there or under way."""
        if self._here or not self._there:
            return
        # allocated, used and freed by the stream that computes, so that its order of work protects their memory
        self._here = [torch.empty_like(there, device=device.device()) for there in self._there]
        self._inward.wait_stream(torch.cuda.current_stream())  # which waited for the copy out before it went on
        with torch.cuda.stream(self._inward):
            for x, there in zip(self._here, self._there, strict=True):
                x.copy_(there, non_blocking=True)
            self._copied = self._inward.record_event()

    def take(self) -> list[Tensor]:
        """The tensors, on the device; those of the layer below begin to come back."""
        self.fetch()
        if self._before is not None:
            self._before.fetch()
        torch.cuda.current_stream().wait_event(self._copied)
        here, self._here, self._there, self._before = self._here, [], [], None
        return here


class Host:
    """The way to pinned memory and back, for all layers of a rank."""

    def __init__(self) -> None:
        self._streams = torch.cuda.Stream(), torch.cuda.Stream()
        self._newest: weakref.ref[Parked] | None = None

    def park(self, tensors: Sequence[Tensor], first: bool) -> Parked:
        """Send off what a layer keeps; what the layer below kept leaves the device.

        Args:
            first: this is the rank's first layer, where a micro-batch begins.
        """
        newest = self._newest() if self._newest is not None else None
        if newest is not None:
            newest.leave()
        parked = Parked(self._streams, tensors, None if first else newest)
        self._newest = weakref.ref(parked)
        return parked
