"""Documents are taken in an order that seed and text alone decide, whatever shards or workers they come from.

Bins of places (see `index`) are visited in an order that the seed decides; in each, documents go by a hash of place and
seed. A part of the mix is complete when its tokens are: its last document is cut there, so that budgets are met to the
token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megalong.data.order import epoch_order
from megalong.data.pipeline.index import Index
from megalong.data.pipeline.pieces import PIECE, Constants
from megalong.data.pipeline.quotas import Group
from megalong.data.pipeline.settings import ANY
from megalong.data.pipeline.units import Taken, Units, mixed, pieces_of, units_of


@dataclass(frozen=True)
class Glue:
    """Token ids around and between documents."""

    before: tuple[int, ...]
    """At the beginning of each (begin of text)."""
    after: tuple[int, ...]
    """At the end of each (end of text)."""
    join: tuple[int, ...]
    """Between those that become one."""


@dataclass
class Chosen:
    """The documents of one part of the mix."""

    group: Group
    taken: list[Taken] = field(default_factory=list)
    tokens: int = 0
    cut: int = 0
    """Tokens left out at the ends of documents: of the last one, and of those cut to whole windows."""


class Chooser:
    """Takes documents of an index.

    Args:
        index: all documents.
        glue: what stands around and between them.
        seed: decides which, and their order.
        given_order: keep the order in which they were read.
        seq_length: window, tokens.
    """

    def __init__(self, index: Index, glue: Glue, constants: Constants, seed: int, given_order: bool, seq_length: int):
        self.index, self.glue, self.seed, self.given_order = index, glue, seed, given_order
        self.seq_length = seq_length
        self._around = len(glue.before) + len(glue.after)
        self._before, self._after, self._join = (constants.place(ids) for ids in (glue.before, glue.after, glue.join))

    def available(self, groups: list[Group]) -> dict[Group, int]:
        """Tokens of each part of the mix in one pass, separators included."""
        found = dict.fromkeys(groups, 0)
        for bin_ in range(self.index.bins):
            units = self._units(bin_, held_out=False)
            for group in groups:
                found[group] += int(self._usable(units, group)[self._member(units, group)].sum())
        return found

    def choose(self, groups: list[Group], passes: int) -> list[Chosen]:
        """Fill every part of the mix to its tokens (or as far as the documents go)."""
        chosen = [Chosen(group) for group in groups]
        for number in range(passes):
            for bin_ in epoch_order(self.seed, number, self.index.bins):
                open_ = [c for c in chosen if c.tokens < c.group.tokens]
                if not open_:
                    return chosen
                self._take(self._units(int(bin_), held_out=False), open_, number)
        return chosen

    def choose_held_out(self, tokens: int) -> Chosen:
        """Held-out documents of all sources, at most so many tokens."""
        chosen = Chosen(Group(ANY, tokens=tokens))
        for bin_ in epoch_order(self.seed, 0, self.index.bins):
            if chosen.tokens < tokens:
                self._take(self._units(int(bin_), held_out=True), [chosen], 0)
        return chosen

    def _units(self, bin_: int, held_out: bool) -> Units:
        records = self.index.documents(bin_)
        return units_of(records[self.index.held_out(records) == held_out], len(self.glue.join))

    def _member(self, units: Units, group: Group) -> np.ndarray:
        inside = (units.lengths >= group.min_tokens) & (units.lengths < (group.max_tokens or 2**62))
        if group.source != ANY:
            inside &= units.sources == self.index.sources.index(group.source)
        return inside & (self._usable(units, group) > 0)

    def _usable(self, units: Units, group: Group) -> np.ndarray:
        """[units] int64: tokens that each gives."""
        tokens = units.lengths + self._around
        window = group.window or self.seq_length
        return tokens // window * window if group.whole_windows else tokens

    def _take(self, units: Units, open_: list[Chosen], number: int) -> None:
        """Add documents of a bin to the parts that are not complete."""
        keys = mixed(units.places, self.seed + number)
        order = np.lexsort((units.records["number"][units.first], units.records["shard"][units.first], keys))
        for chosen in open_:
            mine = order[self._member(units, chosen.group)[order]]
            usable = self._usable(units, chosen.group)[mine]
            before = np.cumsum(usable) - usable
            wanted = chosen.group.tokens - chosen.tokens
            mine, usable = mine[before < wanted], usable[before < wanted]
            if not len(mine):
                continue
            limits = np.minimum(usable, wanted - before[: len(mine)])
            pieces, owner = self._pieces(units, mine, limits)
            chosen.taken.append(Taken(pieces, owner, limits, self._keys(units, mine, keys[mine], number)))
            chosen.tokens += int(limits.sum())
            chosen.cut += int((units.lengths[mine] + self._around - limits).sum())

    def _keys(self, units: Units, mine: np.ndarray, keys: np.ndarray, number: int) -> np.ndarray:
        records = units.records[units.first[mine]]
        read = [records["shard"].astype(np.uint64), records["number"]]
        passes = np.full(len(mine), number, np.uint64)
        return np.stack([passes, *read, keys] if self.given_order else [keys, passes, *read])

    def _pieces(self, units: Units, mine: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shuffle = None if self.given_order else (lambda hashes: mixed(hashes, self.seed))
        return pieces_of(units, mine, limits, (self._before, self._join, self._after), shuffle)


def laid(chosen: list[Chosen], sources: list[str]) -> np.ndarray:
    """All documents end to end, [pieces] PIECE: whole windows first, then source by source in the order of keys."""
    taken = [(c.group, t) for c in chosen for t in c.taken]
    if not taken:
        return np.empty(0, PIECE)
    ranks = [
        np.full(len(t.lengths), (0 if g.whole_windows else 1 + len(sources)) + _rank(g, sources), np.uint64)
        for g, t in taken
    ]
    keys = np.concatenate([t.keys for _, t in taken], axis=1)
    order = np.lexsort((*keys[::-1], np.concatenate(ranks)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first = np.cumsum([0, *(len(t.lengths) for _, t in taken)])
    owner = np.concatenate([t.owner + f for (_, t), f in zip(taken, first, strict=False)])
    return np.concatenate([t.pieces for _, t in taken])[np.argsort(place[owner], kind="stable")]


def _rank(group: Group, sources: list[str]) -> int:
    return sources.index(group.source) if group.source != ANY else len(sources)
