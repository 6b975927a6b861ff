"""What lies in a Hugging Face directory besides weights? Tokenizer, generation and licence files, carried along as is.

Tokenizer, generation, licence and original config files are read once, compared with the directory's checksums, and
kept as they are. Two limits in them belong to the window, not to the tokenizer or the way of sampling: in an export of
a model whose window has changed they say the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalong.checkpoint.checksums import Checksums
from megalong.checkpoint.info import HF_FILES
from megalong.convert.safetensors_dir import INDEX, SINGLE
from megalong.model.llama import read_hf_config
from megalong.runtime.errors import CheckpointError
from megalong.runtime.json_file import parse

CONFIG = "config.json"
CARRIED = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
)
"""What belongs to a Hugging Face directory besides weights: tokenizer files of every Llama generation, generation and
chat settings, and texts that a licence asks to keep."""

_NO_LIMIT = 1e20  # transformers' LARGE_INTEGER; its tokenizers write int(1e30) where there is no limit


def is_hf(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model directory."""
    return (folder / CONFIG).is_file() or (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory, compared with the directory's checksums.

    Raises:
        CheckpointError: missing, damaged or not JSON.
    """
    Checksums(folder).check(CONFIG)
    return read_hf_config(folder)


def read_carried(folder: Path) -> dict[str, bytes]:
    """Name -> content of the files that travel along.

    Args:
        folder: a Hugging Face directory, or a checkpoint's `hf_files`; it may be missing.

    Raises:
        CheckpointError: a file is not what the list of checksums says, or cannot be read.
    """
    inside = folder.name == HF_FILES
    sums = Checksums(folder.parent if inside else folder)
    found = {}
    for name in CARRIED:
        if (folder / name).is_file():
            sums.check(f"{HF_FILES}/{name}" if inside else name)
            try:
                found[name] = (folder / name).read_bytes()
            except OSError as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}.") from error
    return found


def for_window(files: Mapping[str, bytes], window: int, where: Path) -> dict[str, bytes]:
    """The same files for a model of another window than the one that they came with.

    The tokenizer's `model_max_length` becomes the window, unless it says that there is no limit; `max_length` of the
    generation config is raised to the window. With the window that they came with, no byte changes.

    Args:
        files: as `read_carried` gives them.
        window: tokens.
        where: the folder they are from, for errors.

    Raises:
        CheckpointError: one of them is not a JSON object.
    """
    if CONFIG in files and json_object(files, CONFIG, where).get("max_position_embeddings") == window:
        return dict(files)
    changed = dict(files)
    for name, key in (("tokenizer_config.json", "model_max_length"), ("generation_config.json", "max_length")):
        if name not in files:
            continue
        content = json_object(files, name, where)
        limit = content.get(key)
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not 0 < limit < _NO_LIMIT:
            continue
        if limit < window or (limit > window and key == "model_max_length"):
            text = json.dumps({**content, key: window}, indent=2, ensure_ascii=False) + "\n"
            changed[name] = text.encode("utf-8", errors="surrogatepass")
    return changed


def json_object(files: Mapping[str, bytes], name: str, where: Path) -> dict[str, Any]:
    """What a JSON file among those of a model holds.

    Args:
        where: the folder that they come from.

    Raises:
        CheckpointError: it is no JSON, or no object.
    """
    try:
        content = parse(files[name])
    except ValueError as error:
        raise CheckpointError(f"{where / name} is damaged: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where / name} is damaged: it must hold a JSON object.")
    return content
