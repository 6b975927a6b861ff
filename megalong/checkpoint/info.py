"""What does a Megatron checkpoint say about itself? A small typed record, `megalong.json`, in every checkpoint.

megatron-core's own files hold tensors and no word on the model. The record holds the complete Hugging Face config of
*this* checkpoint (theta and window of its stage, in both spellings), where in the recipe it stands, and what wrote it.
Beside it, `hf_files/` carries the tokenizer, the generation config and the original config.json along, so that an
export needs nothing but the checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megalong import __version__
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import write_text

INFO = "megalong.json"
HF_FILES = "hf_files"
FORMAT_VERSION = 1

# What belongs to a Hugging Face directory besides weights: tokenizer files of every Llama generation, generation and
# chat settings, and texts that a licence asks to keep.
CARRIED = (
    "config.json",
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


def _versions() -> dict[str, str]:
    return {"megalong": __version__} | {
        name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers", "safetensors")
    }


@dataclass(frozen=True)
class CheckpointInfo:
    """The record in `megalong.json`."""

    hf_config: dict[str, Any]
    """Complete config.json of the model as it stands in this checkpoint."""
    stage: str | None
    """Stage of the recipe that trained it; None for a checkpoint that was converted."""
    seq_length: int
    """Window, tokens."""
    theta: float
    """Rotary base."""
    step: int = 0
    """Optimizer steps done in the stage."""
    consumed_samples: int = 0
    """Sequences read in the stage."""
    versions: dict[str, str] = field(default_factory=_versions)
    """Libraries that wrote the checkpoint."""
    format_version: int = FORMAT_VERSION


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write the record into a checkpoint folder."""
    write_text(folder / INFO, info_json(info))


def info_json(info: CheckpointInfo) -> str:
    """The text of `megalong.json`."""
    return json.dumps(asdict(info), indent=2) + "\n"


def read_info(folder: Path) -> CheckpointInfo:
    """Read the record of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or written by a later version.
    """
    path = folder / INFO
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this megalong reads version {FORMAT_VERSION}. Use the version "
                f"that wrote it: {record.get('versions')}."
            )
        info = CheckpointInfo(**{f.name: record[f.name] for f in fields(CheckpointInfo)})
        if not isinstance(info.hf_config, dict):
            raise TypeError("hf_config is not an object")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is not a whole checkpoint of megalong. Use an older step, or convert again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}). Use an older step.") from error
    return info


def carry_files(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, generation and original config files from `source` (a Hugging Face directory or another
    checkpoint's `hf_files`) into the folder `target`; returns the names copied."""
    names = [name for name in CARRIED if (source / name).is_file()]
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
