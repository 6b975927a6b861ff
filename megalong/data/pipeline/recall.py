"""Sequences that need what stood far back: facts are put early into real text, and asked for at its end.

Such a sequence is one document, so that `attention.document_mask=intra` does not hide the facts from the questions.
Everything follows from the seed and the number of the sequence. The text around the facts is the stage's own mix: its
tokens are used once, and the facts and questions are a source of their own (`recall`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megalong.data.pipeline.pieces import CONSTANT, PIECE, Constants
from megalong.runtime.errors import ConfigError

SOURCE = "recall"
NEAR = 256
"""Tokens after a random place within which the end of a line is looked for."""
_COLOURS = "amber azure black bronze cobalt copper coral crimson golden green grey indigo ivory jade lilac olive "
_COLOURS += "orange pearl purple red rose ruby scarlet silver tan teal violet white yellow sable"
_THINGS = "anchor archive bakery beacon bridge canal castle chapel clinic depot engine ferry forge garden harbour "
_THINGS += "island kettle ladder lantern library market meadow mill mirror museum orchard palace quarry tower vault"
_FACT = "\nThe code of the {name} is {code}.\n"
_ASKED = "\nQuestion: What is the code of the {name}?\nAnswer: The code of the {name} is {code}.\n"

Ids = tuple[int, ...]


class Facts:
    """What is told and asked in one sequence.

    Args:
        encode: text -> token ids.
        seed, number: of the run of the tool, and of the sequence.
        facts: how many.
    """

    def __init__(self, encode: Callable[[str], Ids], seed: int, number: int, facts: int, after: Ids) -> None:
        colours, things = _COLOURS.split(), _THINGS.split()
        self.raw = np.random.Philox(key=[seed % 2**64, 2**63 + number]).random_raw(4 * len(colours) * len(things))
        pairs = np.argsort(self.raw[: len(colours) * len(things)], kind="stable")[:facts]
        names = [f"{colours[p % len(colours)]} {things[p // len(colours)]}" for p in pairs.tolist()]
        codes = [str(1_000_000 + int(r % 9_000_000)) for r in self.raw[len(pairs) : 2 * len(pairs)]]
        asked = np.argsort(self.raw[2 * facts : 3 * facts], kind="stable")
        told = list(zip(names, codes, strict=True))
        self.told = [encode(_FACT.format(name=n, code=c)) for n, c in told]
        questions = "".join(_ASKED.format(name=told[i][0], code=told[i][1]) for i in asked.tolist())
        self.asked = encode(questions) + after

    @property
    def tokens(self) -> int:
        """Tokens of facts and questions together."""
        return sum(map(len, self.told)) + len(self.asked)

    def woven(
        self,
        pieces: np.ndarray,
        early: int,
        constants: Constants,
        source: int,
        ends_line: Callable[[int, int, int], np.ndarray],
    ) -> np.ndarray:
        """The pieces of the sequence.

        Args:
            pieces: the text around, as many tokens as the window has room for.
            early: facts begin among its first so many tokens.
            source: number of the source `recall`.
            ends_line: (shard, first, last) -> [last - first] bool: which of these tokens end a line.
        """
        places = np.sort(self.raw[-len(self.told) :] % np.uint64(max(1, early))).astype(np.int64)
        starts = np.cumsum(pieces["length"]) - pieces["length"]
        found: list[np.ndarray] = []
        done = 0  # tokens of `pieces` that are in `found`
        for place, ids in zip(places.tolist(), self.told, strict=True):
            at = max(done, _line_end(pieces, starts, place, ends_line))
            found += [_between(pieces, starts, done, at), _constant(constants, ids, source)]
            done = at
        found += [_between(pieces, starts, done, int(pieces["length"].sum()))]
        found += [_constant(constants, self.asked, source)]
        whole = np.concatenate(found)
        whole["opens"] = False
        whole["opens"][0] = True
        return whole


def _line_end(
    pieces: np.ndarray, starts: np.ndarray, place: int, ends_line: Callable[[int, int, int], np.ndarray]
) -> int:
    """The first place from `place` on that a line ends before; `place` if there is none near."""
    i = int(np.searchsorted(starts, place, "right")) - 1
    piece, inside = pieces[i], place - int(starts[i])
    if piece["shard"] == CONSTANT:
        return int(starts[i]) + int(piece["length"])
    first = int(piece["start"]) + inside
    ends = np.flatnonzero(
        ends_line(int(piece["shard"]), first, min(first + NEAR, int(piece["start"] + piece["length"])))
    )
    return place + (int(ends[0]) + 1 if len(ends) else 0)


def _between(pieces: np.ndarray, starts: np.ndarray, first: int, last: int) -> np.ndarray:
    """The tokens from first to last - 1."""
    found = pieces.copy()
    skipped = np.clip(first - starts, 0, found["length"])
    found["start"] += skipped
    found["length"] = np.clip(last - starts, 0, found["length"]) - skipped
    return found[found["length"] > 0]


def _constant(constants: Constants, ids: Ids, source: int) -> np.ndarray:
    return np.array([(CONSTANT, source, *constants.place(ids), False)], PIECE)


def woven_into(
    pieces: np.ndarray,
    facts: list[Facts],
    whole: int,
    rows: int,
    seq_length: int,
    early: float,
    constants: Constants,
    source: int,
    ends_line: Callable[[int, int, int], np.ndarray],
) -> np.ndarray:
    """A stream in which evenly spread rows have facts and questions.

    Args:
        pieces: the stream without them, `rows * seq_length` tokens less those of `facts`.
        whole: rows at the beginning that stay as they are (whole windows).
        early: share of a row.

    Raises:
        ConfigError: a window has no room for the facts, or there are too few rows.
    """
    longest = max(f.tokens for f in facts)
    if longest > seq_length // 2:
        raise ConfigError(
            f"data.recall.facts={len(facts[0].told)}: facts and questions take {longest:,} tokens, "
            f"more than half of a window of {seq_length:,}. Take fewer."
        )
    if len(facts) > rows - whole:
        raise ConfigError(f"data.recall.share: {len(facts)} sequences of {rows - whole} that are not whole windows.")
    with_facts = {whole + (2 * i + 1) * (rows - whole) // (2 * len(facts)): f for i, f in enumerate(facts)}
    found, done = [], 0
    for row in sorted(with_facts):
        before = row * seq_length - sum(f.tokens for r, f in with_facts.items() if r < row)
        room = seq_length - with_facts[row].tokens
        between = take(pieces, done, before)
        if done and len(between):
            between["opens"][0] = True  # what was a document's middle follows on another document now
        found.append(between)
        text = take(pieces, before, before + room)
        found.append(with_facts[row].woven(text, int(early * room), constants, source, ends_line))
        done = before + room
    following = take(pieces, done, int(pieces["length"].sum()))
    if len(following):
        following["opens"][0] = True
    return np.concatenate([*found, following])


def take(pieces: np.ndarray, first: int, last: int) -> np.ndarray:
    """Tokens first to last - 1 of a stream, as pieces."""
    ends = np.cumsum(pieces["length"])
    i, j = int(np.searchsorted(ends, first, "right")), int(np.searchsorted(ends, last, "left")) + 1
    offset = int(ends[i - 1]) if i else 0
    near = pieces[i:j]
    found = _between(near, np.cumsum(near["length"]) - near["length"], first - offset, last - offset)
    if len(found) and first > offset:
        found["opens"][0] = False
    return found
