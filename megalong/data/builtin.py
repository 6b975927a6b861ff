"""The real text that is on every machine: Python sources of the interpreter and of the installed packages.

From it a small run gets its tokenizer and its sequences with nothing downloaded and nothing given. Everything is made
once, in a cache folder, under a lock: ranks and processes that start together wait for the first and then share.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megalong.data.manifest import VERSION
from megalong.data.output_folder import output_folder
from megalong.data.prepare import prepare
from megalong.runtime.errors import DataError

CORPUS_BYTES = 8_000_000
"""Text taken: 2.5 million tokens, tokenized in a second."""
FILE_BYTES = (24_000, 200_000)
"""Sizes of the files taken, at 3.2 bytes a token: beyond a window of 4096 tokens, and no file outweighs the rest."""
EVAL_FRACTION = 0.1
END_OF_TEXT = "<|end_of_text|>"


def builtin_corpus(cache_dir: Path, seq_length: int, vocab_size: int) -> Path:
    """The data folder of Python sources for a window; made if it is not there (a few seconds).

    Args:
        cache_dir: folder shared by all ranks; each vocabulary gets its own folder in it.
        seq_length: window, tokens.
        vocab_size: size of the byte-level BPE tokenizer, the end-of-text token included; at least 257.

    Raises:
        DataError: the cache cannot be written, or the machine has next to no Python source.
    """
    text, tokenizer = _base(cache_dir, vocab_size)
    folder = text.parent.parent / f"window-{seq_length}"
    with _lock(cache_dir):
        if not folder.exists():
            prepare(text, folder, tokenizer, seq_length, eval_fraction=EVAL_FRACTION, progress=False)
    return folder


def builtin_tokenizer(cache_dir: Path, vocab_size: int) -> Path:
    """The folder of that corpus's tokenizer, in the files that transformers loads; made if it is not there."""
    return _base(cache_dir, vocab_size)[1]


def _base(cache_dir: Path, vocab_size: int) -> tuple[Path, Path]:
    """The text as JSON lines, and the tokenizer's folder."""
    assert vocab_size > 256, vocab_size
    base = cache_dir / f"python-{vocab_size}-v{VERSION}" / "text"
    with _lock(cache_dir):
        if not base.exists():
            texts = list(python_sources(CORPUS_BYTES))
            if sum(map(len, texts)) < CORPUS_BYTES // 8:
                raise DataError(f"Hardly any Python source was found below {_roots()}. Give data.path instead.")
            with output_folder(base) as folder:
                (folder / "tokenizer").mkdir()
                train_tokenizer(texts, vocab_size, folder / "tokenizer")
                lines = (json.dumps({"text": text}) + "\n" for text in texts)
                (folder / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    return base / "text.jsonl", base / "tokenizer"


def python_sources(total_bytes: int) -> Iterator[str]:
    """Source files of middle size in an order that depends on their names alone, up to `total_bytes` in all.

    A file that cannot be read as UTF-8 is passed over.
    """
    for path in _candidates():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        total_bytes -= len(text.encode())
        if total_bytes < 0:
            return
        yield text


def train_tokenizer(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and write it as transformers loads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")


def _roots() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]


def _candidates() -> list[Path]:
    """Python files of a fitting size below the roots, shuffled by the hash of their names."""
    found: dict[str, Path] = {}
    for root in _roots():
        for folder, subfolders, names in os.walk(root):
            # packages are reached through their own root; the interpreter's may be another environment's
            subfolders[:] = [s for s in subfolders if s not in ("site-packages", "dist-packages", "__pycache__")]
            for name in names:
                path = Path(folder, name)
                if name.endswith(".py") and _size_fits(path):
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return [found[n] for n in sorted(found, key=lambda n: (hashlib.sha256(n.encode()).digest(), n))]


def _size_fits(path: Path) -> bool:
    try:
        return FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]
    except OSError:
        return False


@contextmanager
def _lock(cache_dir: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel releases it when its holder dies."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(cache_dir / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise DataError(
            f"The cache folder {cache_dir} cannot be written ({error.strerror}). Give data.path."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
