"""How does a person's own text become a data folder for one window?"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from megalong.data.builder import build, tokenize
from megalong.data.manifest import Manifest
from megalong.data.sources import read_texts, source_files
from megalong.data.tokenizer import load_tokenizer
from megalong.runtime.errors import DataError


def prepare(
    source: Path,
    out: Path,
    tokenizer: Path,
    seq_length: int,
    *,
    eval_fraction: float = 0.01,
    min_tokens: int = 0,
    progress: bool = True,
) -> Manifest:
    """Tokenize and pack the text below `source` into the data folder `out`.

    Args:
        source: a file or folder of text files (one document each) or .jsonl with a "text" field (one document a line).
        tokenizer: Hugging Face directory with tokenizer.json, or a tokenizer.json.
        seq_length: window, tokens.
        eval_fraction: share of the documents to hold out, 0 to 1 (exclusive); which ones follows from their content.
        min_tokens: shorter documents are left out; raise it to train on long texts only.
        progress: show a bar in bytes of source on stderr.

    Raises:
        DataError: what is wrong with the source, the tokenizer or the target.
    """
    if not 0 < eval_fraction < 1:
        raise DataError(f"eval_fraction={eval_fraction}: give a share between 0 and 1, such as 0.01.")
    if seq_length < 1:
        raise DataError(f"seq_length={seq_length}: a window has at least one token.")
    if out.exists():  # said before hours of tokenizing, not after
        raise DataError(f"{out} exists already; it is left as it is. Remove it or choose another folder.")
    text_tokenizer = load_tokenizer(tokenizer)
    files = source_files(source)
    total = sum(p.stat().st_size for p in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not progress) as bar:
        texts = read_texts(files, bar.update)
        documents = tokenize(texts, text_tokenizer, eval_fraction=eval_fraction, min_tokens=min_tokens)
        return build(documents, out, tokenizer=text_tokenizer.info, seq_length=seq_length, source=str(source))
