"""What does a Megatron checkpoint say about itself? A small typed record, `megalong.json`, in every checkpoint.

megatron-core's own files hold tensors and no word on the model. The record holds the complete Hugging Face config of
*this* checkpoint (theta and window of its stage, in both spellings), where in the recipe it stands, and what wrote it.
Beside it, `hf_files/` carries the tokenizer, the generation config and the original config.json along, so that an
export needs nothing but the checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from megalong import __version__
from megalong.runtime.errors import CheckpointError
from megalong.runtime.files import write_text
from megalong.runtime.json_file import read_as, read_json, shown

INFO = "megalong.json"
HF_FILES = "hf_files"
FORMAT_VERSION = 1


def _versions() -> dict[str, str]:
    return {"megalong": __version__} | {
        name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers", "safetensors")
    }


@cache
def _commit() -> dict[str, str]:
    """The commit, with "-dirty" where a file was changed; nothing if it is none."""
    package = Path(__file__).resolve().parents[1]
    try:
        for words in ("ls-files --error-unmatch __init__.py", "describe --always --dirty --abbrev=40"):
            command = ["git", "-C", str(package), *words.split()]
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": done.stdout.strip()}


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
    tokens_before: int = 0
    """Tokens read by the stages before it; 0 in a checkpoint that was written before they were counted."""
    versions: dict[str, str] = field(default_factory=_versions)
    """Libraries that wrote the checkpoint."""
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        """Tokens read to get here, by this stage and those before it."""
        return self.tokens_before + self.consumed_samples * self.seq_length


def write_info(folder: Path, info: CheckpointInfo) -> None:
    """Write the record into a checkpoint folder, with the commit that this is a checkout of."""
    # here, not in every record that is made: one rank writes, and git need not be asked by all of them
    write_text(folder / INFO, info_json(replace(info, versions={**info.versions, **_commit()})))


def info_json(info: CheckpointInfo) -> str:
    """The text of `megalong.json`."""
    return json.dumps(asdict(info), indent=2) + "\n"


def read_info(folder: Path) -> CheckpointInfo:
    """Read the record of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or written by a later version.
    """
    path = folder / INFO
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing: {folder} is not a whole checkpoint of megalong. Use an older step, or convert again."
        )
    record = read_json(path, CheckpointError, "Use an older step.")
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {shown(version)}; this megalong reads version {FORMAT_VERSION}. Use the "
            f"version that wrote it: {shown(record.get('versions'), 200)}."
        )
    record.setdefault("tokens_before", 0)
    info = read_as(CheckpointInfo, record, f"{path} is damaged", CheckpointError, "Use an older step.", exact=False)
    for name in ("seq_length", "step", "consumed_samples", "tokens_before", "tokens"):
        if not 0 <= getattr(info, name) < 2**63:
            raise CheckpointError(f"{path} is damaged: {name}={shown(getattr(info, name))}. Use an older step.")
    return info
