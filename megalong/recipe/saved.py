"""With which configuration was a checkpoint made? Its `config.yaml`, read whoever wrote it.

YAML can name Python objects, repeat a part by reference until it fills the memory, and be nested without end. What is
read here is plain values, each written out, a few levels deep: what the trainer writes.
"""

from __future__ import annotations

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from megalong.config.schema import Config
from megalong.recipe.compose import from_yaml
from megalong.runtime.errors import CheckpointError

FILE = "config.yaml"
_LIMIT = 1_000_000  # bytes
_DEPTH = 20


def saved_config(folder: Path) -> Config:
    """The configuration in a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, or not a configuration of this version.
    """
    path = folder / FILE
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        text = path.read_text(encoding="utf-8")
        _check_plain(text)
        return from_yaml(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a whole checkpoint. Use an older step.") from error
    except Exception as error:  # yaml and omegaconf raise whatever hostile text makes them trip over
        reason = " ".join(str(error).split())[:500]
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {reason}. Use an older step.") from error


def _check_plain(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("a part of it stands for another one")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(f"it is nested more than {_DEPTH} levels deep")
