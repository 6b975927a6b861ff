"""What waits on the host comes back whole, however late its copies run: streams that do nothing until they are awaited.

On a GPU a copy runs when its stream gets to it, not when it is written down. Here a side stream holds its copies back
until something that waits for them is done, and memory that was given up is overwritten at once: a wait that is missing
shows as a NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megalong.model import host as module
from megalong.model.host import Host, Parked


class Lazy:
    """A stream that runs what it was given only when an event behind it is awaited."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def run_to(self, place: int) -> None:
        while self.done < place:
            self.done += 1
            self.work[self.done - 1]()

    def record_event(self) -> Callable[[], object]:
        place = len(self.work)
        return lambda: self.run_to(place)

    def wait_event(self, event: Callable[[], object]) -> None:
        self.work.append(event)

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Computing)


class Computing:
    """The stream that computes: it runs at once."""

    def wait_event(self, event: Callable[[], object]) -> None:
        event()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[Lazy] = []
    copy, empty_like = torch.Tensor.copy_, torch.empty_like

    @contextmanager
    def stream(one: Lazy) -> Iterator[None]:
        at.append(one)
        yield
        at.pop()

    def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if at:
            at[-1].work.append(lambda: copy(target, source))
            return target
        return copy(target, source)

    def unwritten(like: torch.Tensor, **_: Any) -> torch.Tensor:
        return empty_like(like, device="cpu").fill_(float("nan"))

    computing = Computing()
    monkeypatch.setattr(torch.cuda, "Stream", Lazy)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(module.torch, "empty_like", unwritten)


LAYERS = 4


def schedule(in_flight: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """1F1B of a rank: forward ahead, then forward and backward in turn, then what is left."""
    for number in range(micro_batches + in_flight):
        if number < micro_batches:
            yield "forward", number
        if number >= in_flight - 1 and number - in_flight + 1 < micro_batches:
            yield "backward", number - in_flight + 1


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_tensors_come_back_whole_however_late_copies_run(lazy: None, in_flight: int) -> None:
    host, kept = Host(), {}
    originals: dict[tuple[int, int], list[torch.Tensor]] = {}
    on_device: list[list[torch.Tensor]] = []
    leave = Parked.leave

    def overwriting(parked: Parked) -> None:
        given_up = parked._here
        leave(parked)
        for x in given_up:
            x.fill_(float("nan"))

    Parked.leave = overwriting  # type: ignore[method-assign]
    try:
        for what, batch in schedule(in_flight, 4):
            if what == "forward":
                for layer in range(LAYERS):
                    tensors = [torch.full((2, 3), 100.0 * batch + layer), torch.full((5,), -1.0 - layer)]
                    originals[batch, layer] = [x.clone() for x in tensors]
                    kept[batch, layer] = host.park(tensors, first=layer == 0)
                continue
            for layer in reversed(range(LAYERS)):
                found = kept.pop((batch, layer)).take()
                assert all(map(torch.equal, found, originals[batch, layer])), (batch, layer)
                on_device.append(found)
                for x in found:  # the layer is done: its memory is used for something else
                    x.fill_(float("nan"))
    finally:
        Parked.leave = leave  # type: ignore[method-assign]
    assert len(on_device) == 4 * LAYERS
