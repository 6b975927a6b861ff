"""Questions put to a long window: needles, records, passkeys, variables, common words, repeated answers.

Written after the published description of RULER (Hsieh et al., arXiv 2404.06654), the passkey of Mohtashami and Jaggi
(arXiv 2305.16300), MRCR (Vodrahalli et al., arXiv 2409.12640) and the key-value retrieval of Liu et al.
(arXiv 2307.03172), for teacher forcing: wherever an answer is a list,
the question fixes its order. docs/evaluation.md says what is scored.

A task is drawn from a random generator of its own, so it is the same for every checkpoint and layout.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalong.config.schema import QUESTIONS

_ADJECTIVES = "amber brisk calm dusty eager frozen gentle hollow ivory jolly keen lunar mellow noble olive plain quiet"
_ADJECTIVES += (
    " rapid silver tender upper violet wooden young zesty ancient bitter crimson distant elastic faint golden"
)
_NOUNS = "anchor basket candle desert engine feather garden harbor island jacket kettle ladder mirror needle orchard"
_NOUNS += " pebble quarry ribbon saddle temple umbrella valley window yogurt zipper bridge cabin dragon falcon guitar"
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()

KEYS, VALUES = ADJECTIVES, NOUNS[:8]
"""What the records of `recall` are about, and what they say."""
RECORD = " {key}: {key}-{value}"
"""What `recall` hides in the text."""
RECALL = " {key}:"
"""What it asks at the end: the beginning of a record, which the model has to finish."""


@dataclass(frozen=True)
class Question:
    """One drawn question, still as text."""

    head: str
    """Stands before the haystack."""
    inserts: list[tuple[float, str]]
    """Depth and text of what is hidden in the haystack."""
    ask: str
    """Stands behind the haystack, the words of the user; its end has no white space."""
    lead: str
    """How the answer begins, given to the model; its end has no white space. Empty: the answer goes on with `ask`
    itself, so the question is running text, which no chat template cuts in two."""
    answers: list[str]
    """What is scored, one slot each, with the white space before it."""
    filler: list[str] | None = None
    """Sentences that take the haystack's place; None: the haystack."""


Draw = Callable[[random.Random, float, int], Question]
"""(generator, depth, tokens of haystack) -> question."""


def names(rng: random.Random, count: int) -> list[str]:
    """Different keys of two words."""
    return [
        f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}"
        for i in rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    ]


def numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of seven digits."""
    return [str(n) for n in rng.sample(range(1_000_000, 10_000_000), count)]


def needles(*, keys: int = 1, values: int = 1, queries: int = 1, distractors: int = 0) -> Draw:
    """Magic numbers hidden in the text.

    Args:
        keys: keys in the text; all but the queried ones mislead.
        values: numbers of each queried key.
        queries: keys that are asked for.
        distractors: needles of the same form with another kind of key, beside `keys`.
    """
    assert queries <= keys

    def draw(rng: random.Random, depth: float, tokens: int) -> Question:
        key, number = names(rng, keys + distractors), numbers(rng, (keys + distractors) * values)
        asked = [(key[i], number[i * values + j]) for i in range(queries) for j in range(values)]
        others = [(key[i], number[i * values]) for i in range(queries, keys + distractors)]
        # the first asked needle lies at the depth that is reported, all others anywhere
        depths = [depth] + [rng.random() for _ in range(len(asked) + len(others) - 1)]
        inserts = [
            (d, f" One of the special magic numbers for {k} is: {n}.")
            for d, (k, n) in zip(depths, [*asked, *others], strict=True)
        ]
        if values > 1:  # the order in the text is the order of the answer
            order = sorted(d for d, _ in inserts[: len(asked)])
            inserts[: len(asked)] = [(d, text) for d, (_, text) in zip(order, inserts, strict=False)]
        listed = " and ".join(key[:queries])
        many = len(asked) > 1
        what = "are all the special magic numbers" if many else "is the special magic number"
        order_words = ", in the order in which they appear" if values > 1 else ", in this order" if queries > 1 else ""
        return Question(
            "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz "
            "you about the numbers afterwards.\n",
            inserts,
            f"\nWhat {what} for {listed} mentioned in the provided text{order_words}?",
            f"The special magic number{'s' if many else ''} for {listed} mentioned in the provided text "
            f"{'are' if many else 'is'}:",
            [("" if i == 0 else ",") + f" {n}" for i, (_, n) in enumerate(asked)],
        )

    return draw


def passkey(rng: random.Random, depth: float, tokens: int) -> Question:
    """A five-digit key in a text that says nothing."""
    key = str(rng.randint(10_000, 99_999))
    return Question(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information there.\n",
        [(depth, f" The pass key is {key}. Remember it. {key} is the pass key.")],
        "\nWhat is the pass key?",
        "The pass key is",
        [f" {key}"],
        [
            "The grass is green.",
            "The sky is blue.",
            "The sun is yellow.",
            "Here we go.",
            "There and back again.",
        ],
    )


def recall(distractors: int = 3) -> Draw:
    """One of a few records begun again, in as few tokens as there can be; keys and values are single words."""

    def draw(rng: random.Random, depth: float, tokens: int) -> Question:
        key, value = rng.sample(KEYS, 1 + distractors), rng.sample(VALUES, 1 + distractors)
        depths = [depth] + [rng.random() for _ in range(distractors)]
        return Question(
            "",
            [(d, RECORD.format(key=k, value=v)) for d, k, v in zip(depths, key, value, strict=True)],
            RECALL.format(key=key[0]),
            "",
            [f" {key[0]}-{value[0]}"],
        )

    return draw


def variable_tracking(hops: int = 4, chains: int = 2) -> Draw:
    """A value handed from variable to variable along the text; other chains mislead."""

    def draw(rng: random.Random, depth: float, tokens: int) -> Question:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        pool = {"".join(rng.choice(letters) for _ in range(3)) for _ in range(50)}
        variables = sorted(pool)
        rng.shuffle(variables)
        values = [str(n) for n in rng.sample(range(10_000, 100_000), chains)]
        inserts = []
        for c in range(chains):
            own = variables[c * (hops + 1) : (c + 1) * (hops + 1)]
            at = sorted(rng.random() for _ in own)
            for i, name in enumerate(own):
                inserts.append((at[i], f" VAR {name} = {values[c] if i == 0 else 'VAR ' + own[i - 1]}."))
        return Question(
            "Memorize and track the chains of variable assignment hidden in the following text.\n",
            inserts,
            f"\nFind all variables that are assigned the value {values[0]} in the text above, in the order in which "
            "they are assigned.",
            f"According to the chain of variable assignment in the text above, {hops + 1} variables are assigned the "
            f"value {values[0]}, they are:",
            [f" {name}" for name in variables[: hops + 1]],
        )

    return draw


def common_words(common: int = 5, often: int = 8, seldom: int = 2) -> Draw:
    """Words that stand in a list more often than the others; asked in alphabetical order."""

    def draw(rng: random.Random, depth: float, tokens: int) -> Question:
        pool = names(rng, min(len(ADJECTIVES) * len(NOUNS), common + max(4, tokens // 8)))
        frequent = sorted(pool[:common])
        # about six tokens a word; the last words of the filler are cut off by the length
        count = max(common * often + 2 * seldom, tokens // 6)
        rest = (pool[common:] * seldom)[: max(1, count - common * often)]
        words = rest
        rng.shuffle(words)
        inserts = [(rng.random(), f" {word}.") for word in frequent for _ in range(often)]
        return Question(
            "Below is a list of words. Memorize which of them appear most often.\n",
            inserts,
            f"\nWhat are the {common} most common words in the above list, in alphabetical order?",
            f"The top {common} words that appear most often in the list are:",
            [("" if i == 0 else ",") + f" {word}" for i, word in enumerate(frequent)],
            [f"{word}." for word in words],
        )

    return draw


def mrcr(repeats: int = 8) -> Draw:
    """The same request made several times in a conversation; one of its answers is asked for by its number."""

    def draw(rng: random.Random, depth: float, tokens: int) -> Question:
        topic = rng.choice(NOUNS)
        code = str(rng.randint(10_000, 99_999))
        order = sorted(rng.random() for _ in range(repeats))
        texts = [
            f"{a.capitalize()} {topic}, the {b} one, by the {c} {d}"
            for a, b, c, d in (
                rng.sample(ADJECTIVES, 2) + rng.sample(ADJECTIVES, 1) + rng.sample(NOUNS, 1) for _ in order
            )
        ]
        inserts = [
            (at, f"\nUser: Write a line about a {topic}.\nAssistant: {text}.\n")
            for at, text in zip(order, texts, strict=True)
        ]
        asked = min(repeats - 1, int(depth * repeats))
        return Question(
            "Below is a conversation in which the same request is made more than once.\n",
            inserts,
            f"\nUser: Write {code}, then repeat line number {asked + 1} about a {topic}.",
            f"Assistant: {code}",
            [f" {texts[asked]}"],
        )

    return draw


TASKS: dict[str, Draw] = {
    "needle": needles(distractors=3),
    "multi_key": needles(keys=8),
    "multi_value": needles(values=4),
    "multi_query": needles(keys=4, queries=4),
    "recall": recall(),
    "passkey": passkey,
    "variables": variable_tracking(),
    "common_words": common_words(),
    "mrcr": mrcr(),
}
assert tuple(TASKS) == QUESTIONS
BY_DEPTH = ("needle", "multi_key", "recall", "passkey", "mrcr")
"""Tasks whose depth says something; the others are drawn at random depths."""


def check_tasks(asked: Sequence[str]) -> list[str]:
    """Names of tasks that do not exist, among those asked for."""
    return [name for name in asked if name not in TASKS]
