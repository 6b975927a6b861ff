"""What can be said of the data to prepare: one dataclass per group of settings, each number with its range."""

from __future__ import annotations

from dataclasses import dataclass, field

from megalong.config.limits import check_limits, number, one_of
from megalong.runtime.errors import ConfigError

ANY = "*"


@dataclass
class Band:
    """A part of the mix: documents of one source and of lengths in a range."""

    source: str = ANY
    """Name of a source; `*`: all of them together."""
    min_tokens: int = number(0, at_least=0)
    max_tokens: int | None = number(None, at_least=1)
    """Lengths from `min_tokens` (included) to `max_tokens` (excluded; None: no end)."""
    share: float = number(0.0, at_least=0, at_most=1)
    """Of all tokens of the stage."""
    whole_windows: bool = False
    """Only whole windows of one document: each is cut to a multiple of the window and fills sequences of its own."""
    window: int | None = number(None, at_least=1)
    """Tokens of its sequences, which steps of their own read, packed to the stage's window, of which it is a divisor;
    +scale divides it as that. None: the stage's."""


@dataclass
class Recall:
    """Sequences made for recall: facts early in a long text, questions about them at its end."""

    share: float = number(0.0, at_least=0, below=1)
    """Of the stage's sequences."""
    facts: int = number(16, at_least=1, at_most=400)
    """Facts in a sequence, all of which are asked for."""
    early: float = number(0.5, above=0, at_most=0.9)
    """Facts stand in this first part of the sequence."""


@dataclass
class Settings:
    """Everything under `data.` of tools/prepare_data.py."""

    source: str | None = None
    """File or folder: .jsonl (plain, .gz, .zst), .parquet, a `datasets` folder, megatron .bin/.idx, text and code."""
    sources: dict[str, str] = field(default_factory=dict)
    """Name -> file or folder, where the sources lie apart."""
    out: str | None = None
    """Data folder to make. None: data/<stage>."""
    tokenizer: str | None = None
    """Hugging Face directory with tokenizer.json. None: that of `init_from`."""
    tokenized: str | None = None
    """Where tokenized shards are kept for all stages. None: `tokenized` beside `out`."""

    text_key: str = "text"
    """Field of a document's text; dots go into objects."""
    source_key: str | None = None
    """Field that names a document's source (SlimPajama: meta.redpajama_set_name). None: the names of `sources`."""
    join_key: str | None = None
    """Documents that agree in this field (a repository, a book) become one; `folder` in trees of text and code."""
    join_text: str = "\n"
    """What stands between documents that were joined."""
    suffixes: list[str] = field(default_factory=list)
    """Suffixes of text and code to read besides the usual ones."""
    max_document_bytes: int = number(16 * 2**20, at_least=1)
    """A longer text counts as a fault; it is never held in memory."""
    max_fault_share: float = number(0.001, at_least=0, at_most=1)
    """Broken documents (bad JSON, bad UTF-8, no text, too large) of all; above it nothing is laid out."""
    max_cut_files: int = number(0, at_least=0)
    """Files that end before their format does; above it nothing is laid out."""

    min_tokens: int = number(1, at_least=1)
    """Shorter documents are left out and counted."""
    dedup: bool = True
    """Leave out every document whose text was there before."""
    eval_fraction: float = number(0.01, above=0, below=1)
    """Share of the documents to hold out; which ones follows from their text, the same for all stages."""
    eval_sequences: int = number(16, at_least=1)
    """Held-out sequences at most."""

    shares: dict[str, float] = field(default_factory=dict)
    """Source -> share of tokens. Empty: as the documents are."""
    long_from: int | None = number(None, at_least=2)
    """Per-source length upsampling: documents of at least so many tokens ..."""
    long_share: float | None = number(None, above=0, at_most=1)
    """... make up this share of every source's tokens, and the mix of sources stays."""
    mix: list[Band] = field(default_factory=list)
    """Explicit mix of sources and lengths; shares sum to 1. Not together with `shares` or `long_from`."""
    max_passes: int = number(1, at_least=1)
    """How often a document may be used where there is too little."""
    recall: Recall = field(default_factory=Recall)

    estimate: bool = True
    """Look at a sample before anything is tokenized, and stop if it says that there is too little."""
    budget: str = one_of(("stage", "all"), "stage")
    """stage: exactly the sequences that the stage consumes; all: every document once."""
    sequences: int | None = number(None, at_least=1)
    """Instead of the stage's."""
    order: str = one_of(("random", "given"), "random")
    """Of documents in the result, and of those that are joined: as they are read, or by the seed."""
    separator: str = one_of(("eos", "eos_bos", "none"), "eos")
    """Between documents: end of text; end of text and begin of text; nothing. Boundaries are recorded in any case."""


def check(settings: Settings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: named, with what to do.
    """
    check_limits(settings, "data.")
    for i, band in enumerate(settings.mix):
        check_limits(band, f"data.mix[{i}].")
        if band.max_tokens is not None and band.max_tokens <= band.min_tokens:
            raise ConfigError(f"data.mix[{i}]: no length is {band.min_tokens} or more and below {band.max_tokens}.")
    if bool(settings.source) == bool(settings.sources):
        raise ConfigError("Give data.source=FILE_OR_FOLDER, or data.sources.NAME=... for each of several; one of both.")
    if settings.out is None:
        raise ConfigError("data.out is missing: the data folder to make.")
    if (settings.long_from is None) != (settings.long_share is None):
        raise ConfigError("data.long_from and data.long_share belong together.")
    if settings.mix and (settings.shares or settings.long_from):
        raise ConfigError("data.mix says everything of the mix: leave out data.shares and data.long_from.")
    chosen = settings.mix or settings.shares or settings.long_from or settings.recall.share
    if settings.budget == "all" and (chosen or settings.sequences):
        raise ConfigError("data.budget=all takes every document once: leave out the mix and data.sequences.")
    for name, shares in (("shares", list(settings.shares.values())), ("mix", [b.share for b in settings.mix])):
        if shares and (abs(sum(shares) - 1) > 1e-6 or min(shares) < 0):
            raise ConfigError(f"data.{name}: shares {shares} sum to {sum(shares):g}, not to 1.")
    _refuse_overlap(settings.mix)


def _refuse_overlap(mix: list[Band]) -> None:
    for i, a in enumerate(mix):
        for b in mix[:i]:
            apart = (a.max_tokens or b.min_tokens + 1) <= b.min_tokens or (b.max_tokens or a.min_tokens + 1) <= (
                a.min_tokens
            )
            if (a.source == b.source or ANY in (a.source, b.source)) and not apart:
                raise ConfigError(
                    f"data.mix: a document of {a.source if a.source != ANY else b.source} could belong to two bands, "
                    f"{_range(b)} and {_range(a)} tokens. Bands must not overlap."
                )


def _range(band: Band) -> str:
    return f"{band.source} {band.min_tokens} to {band.max_tokens or 'any'}"
