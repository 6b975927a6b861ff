"""How high does memory rise over a whole step of one rank: layers, loss, pipeline, recompute?

Forward of one micro-batch, then its backward, at the moment when the rank holds the most micro-batches of the 1F1B
pipeline schedule. Equal layers in the middle are booked in one piece: only the first and the last can be the highest.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalong.planning.activations import SAVED, WORKING, LayerTape, Saved
from megalong.planning.parameters import padded_vocab_size
from megalong.planning.tape import Tape
from megalong.planning.workload import Workload

LOSS, IN_FLIGHT = "logits and loss", "pipeline micro-batches in flight"


@dataclass(frozen=True)
class StepMemory:
    """Bytes above what a rank holds between steps."""

    saved: int
    """Kept between forward and backward of one micro-batch."""
    peak: int
    """Highest point of forward and backward."""
    at_peak: dict[str, int]
    """The peak by term."""


def step_memory(work: Workload, pp_rank: int) -> StepMemory:
    """Play one micro-batch of a rank on pipeline stage `pp_rank`."""
    tape = Tape()
    in_flight = min(work.micro_batches, work.layout.pp - pp_rank)
    if in_flight > 1:
        alone = _play(work, pp_rank, Tape())
        tape.take(IN_FLIGHT, (in_flight - 1) * alone)
    saved = _play(work, pp_rank, tape)
    return StepMemory(saved, tape.peak, tape.at_peak)


def _play(work: Workload, pp_rank: int, tape: Tape) -> int:
    """Forward and backward of one micro-batch; returns the bytes kept in between."""
    before = tape.live
    layer = LayerTape(work, tape)
    first, last = pp_rank == 0, pp_rank == work.layout.pp - 1
    full = work.recompute == "full"
    hidden = layer.take(layer.hidden_bytes)  # embedding, or what the stage before sent
    entered = hidden
    kept: list[Saved] = []
    inputs: list[int] = []
    middle = 0
    for index in range(work.layers):
        if index == 1 and work.layers > 3:
            # the layers between the first and the last keep what the first kept
            middle = tape.take(SAVED, (work.layers - 2) * _layer_saved(work))
        elif not 1 <= index < work.layers - 1 or work.layers <= 3:
            output, saved = layer.forward(hidden, keep=not full)
            kept.append(saved)
            inputs.append(hidden)
            if hidden != entered and (full or not layer.mixed):
                tape.move(SAVED, hidden)
            elif hidden != entered:
                tape.drop(hidden)
            hidden = output
    final = Saved()
    if last:
        normed = layer.norm_forward(True, final)
        tape.move(SAVED, *final.handles())
        if layer.mixed:
            tape.drop(hidden)
        else:
            tape.move(SAVED, hidden)
        pieces = _loss_forward(work, layer, tape)
    else:
        tape.drop(hidden)  # sent on; the schedule keeps an empty shell
        pieces = []
    tape.move(SAVED, entered)
    if not full and layer.mixed and first:
        tape.drop(entered)
        entered = 0
    kept_bytes = tape.live - before

    if last:
        grad = _loss_backward(work, layer, tape, pieces)
        tape.drop(normed)
        final.norm_out.clear()
        grad = layer.norm_backward(grad, final)
        if not layer.mixed:
            tape.drop(hidden)
    else:
        grad = layer.take(layer.hidden_bytes)  # received
    while kept:
        saved, source = kept.pop(), inputs.pop()
        if full:
            output, saved = layer.forward(source, keep=True)
            tape.drop(output)
        grad = layer.backward(grad, saved)
        if source != entered and (full or not layer.mixed):
            tape.drop(source)
        if middle:
            tape.drop(middle)
            middle = 0
    if first:
        _embedding_backward(work, layer, tape)
    tape.drop(grad, entered)
    assert tape.live == before, (tape.live, before)
    return kept_bytes


def _layer_saved(work: Workload) -> int:
    tape = Tape()
    layer = LayerTape(work, tape)
    hidden = layer.take(layer.hidden_bytes)
    if work.recompute == "full":
        return tape.live
    output, _ = layer.forward(hidden, keep=True)
    tape.drop(output)
    return tape.live - (layer.hidden_bytes if layer.mixed else 0)


def _piece(work: Workload) -> tuple[int, int]:
    """Tokens whose logits exist at one time, and the width of the vocabulary on this rank."""
    tp = work.layout.tp
    return work.local_tokens // work.loss_chunks, padded_vocab_size(work.model.vocab_size, tp) // tp


def _loss_forward(work: Workload, layer: LayerTape, tape: Tape) -> list[int]:
    tokens, vocab = _piece(work)
    # losses, and the labels of each piece, laid out for it and again for its backward
    losses = tape.take(LOSS, (4 + 16) * work.local_tokens)
    logits = tape.take(LOSS, tokens * vocab * layer.e)
    probabilities = tape.take(LOSS, 4 * tokens * vocab) if layer.mixed else 0
    if work.loss_chunks > 1:
        tape.drop(logits, probabilities)
        return [losses]
    if layer.mixed:
        tape.drop(logits)
        return [losses, probabilities]
    return [losses, logits]


def _loss_backward(work: Workload, layer: LayerTape, tape: Tape, pieces: list[int]) -> int:
    """Returns the gradient of the hidden states that enter the output layer."""
    tokens, vocab = _piece(work)
    weight = vocab * work.model.hidden_size
    several = work.loss_chunks > 1
    losses, *probabilities = pieces
    total = 0
    gradient = tape.take(LOSS, weight * layer.e) if several else 0  # sum over the pieces so far
    if several:
        total = layer.take(layer.hidden_bytes)
        logits = tape.take(LOSS, tokens * vocab * layer.e)
        if layer.mixed:
            probabilities = [tape.take(LOSS, 4 * tokens * vocab)]
            tape.drop(logits)
        else:
            probabilities = [logits]
    narrow = tape.take(LOSS, tokens * vocab * 2) if layer.mixed else 0
    if layer.mixed:
        tape.drop(*probabilities)
    whole = layer.take(tokens * work.model.hidden_size * layer.e)
    own = layer.take(tokens // layer.tp * work.model.hidden_size * layer.e) if layer.tp > 1 else 0
    new = tape.take(LOSS, weight * layer.e)
    tape.drop(narrow, whole if layer.tp > 1 else 0)
    if not layer.mixed:
        tape.drop(*probabilities)
    if several:
        tape.drop(new)
        wide = layer.take(layer.hidden_bytes)  # the piece's gradient, zero elsewhere
        tape.drop(own or whole, wide)
        new = gradient
    copy = tape.take(LOSS, 4 * weight) if layer.mixed and work.device == "cpu" else 0
    tape.drop(new, copy, losses)
    return total if several else own or whole


def _embedding_backward(work: Workload, layer: LayerTape, tape: Tape) -> None:
    """The dense gradient of the embedding, until it is in the main gradient."""
    weight = padded_vocab_size(work.model.vocab_size, layer.tp) // layer.tp * work.model.hidden_size
    whole = layer.take(work.local_tokens * work.model.hidden_size * layer.e) if layer.tp > 1 else 0
    gradient = tape.take(WORKING, weight * layer.e)
    copy = tape.take(WORKING, 4 * weight) if layer.mixed and work.device == "cpu" else 0
    tape.drop(gradient, copy, whole)
