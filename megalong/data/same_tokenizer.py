"""The tokenizer of the data is held against the one that the model came with.

Nothing else would say so: ids inside the vocabulary train without an error, and only the model is ruined.
"""

from __future__ import annotations

from pathlib import Path

from megalong.data.manifest import TokenizerInfo
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime.errors import DataError

PADDING = 512
"""Embeddings are padded to multiples of at most this many rows; more rows without a token are another vocabulary."""


def check_tokenizer(
    used: TokenizerInfo, data: str, model_folder: Path, vocab_size: int, allowed: str | None
) -> str | None:
    """Compare hash, size and end-of-text id of the data's tokenizer with those of the model's.

    Args:
        used: what the data's manifest says.
        data: the data folder, as messages call it.
        model_folder: where the weights come from: tokenizer.json lies in it or does not.
        vocab_size: rows of the model's embedding.
        allowed: name of a tokenizer that may differ (`data.allow_tokenizer`).

    Returns:
        what the user should know, if anything.

    Raises:
        DataError: they differ, and the tokenizer is not the allowed one.
    """
    differences = _differences(used, model_folder, vocab_size)
    if differences and used.name == allowed:
        return f"data.allow_tokenizer={allowed}: {data} was not made with the model's tokenizer ({differences})"
    if differences:
        raise DataError(
            f"{data} was made with tokenizer {used.name}, which is not the model's own ({differences}). "
            f"Prepare the data with --tokenizer {model_folder}, or, if this is what you want, say "
            f"data.allow_tokenizer={used.name}."
        )
    if not (model_folder / "tokenizer.json").is_file():
        return f"{model_folder} has no tokenizer.json: whether {data} was made with the model's tokenizer is not known"
    return None


def _differences(used: TokenizerInfo, folder: Path, vocab_size: int) -> str:
    if not (folder / "tokenizer.json").is_file():
        if -(-used.vocab_size // PADDING) * PADDING < vocab_size:
            return f"{used.vocab_size:,} tokens, and the model has {vocab_size:,} rows"
        return ""
    try:
        own = load_tokenizer(folder).info
    except DataError as error:
        return str(error).rstrip(".")
    found = []
    if used.vocab_size != own.vocab_size:
        found.append(f"{used.vocab_size:,} tokens instead of {own.vocab_size:,}")
    if used.eos_token_id != own.eos_token_id:
        found.append(f"end of text {used.eos_token_id} instead of {own.eos_token_id}")
    if used.sha256 != own.sha256:
        found.append(f"tokenizer.json {used.sha256[:12]} instead of {own.sha256[:12]} (SHA-256)")
    return ", ".join(found)
