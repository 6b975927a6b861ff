"""Is this the run that the checkpoint belongs to? What decides what is trained must be the same, unless told."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megalong.config.schema import Config
from megalong.recipe.saved import saved_config
from megalong.runtime.errors import ConfigError

MEANING = (
    "stage.name",
    "stage.seq_length",
    "stage.theta",
    "train.steps",
    "train.lr",
    "train.global_batch_size",
    "attention.document_mask",
    "precision",
    "seed",
    "model.",
    "optimizer.",
)
"""Settings, and whole groups of them, that decide what is trained. All others may change between attempts."""


def check_same_run(config: Config, folder: Path) -> list[str]:
    """A resume may change the layout or the machines, not what is being trained, unless told.

    Returns:
        what is different, `key before -> now`.

    Raises:
        CheckpointError: the checkpoint's config.yaml is damaged.
        ConfigError: a setting of `MEANING` is different and not in `checkpoint.allow_changed`.
    """
    before = _flat(asdict(saved_config(folder)))
    now = _flat(asdict(config))
    silent = (
        "checkpoint.",
        "train.stop_after",
        "train.profile",
        "run_dir",
        "init_from",
        "cluster.",
        "stage.",
        "scale.",
        "searchpath",
    )
    if config.data.path is None:  # the built-in corpus is filled in later
        before["data.path"] = None
    changed = {k: f"{k} {before.get(k)} -> {now.get(k)}" for k in {**before, **now} if before.get(k) != now.get(k)}
    refused = {k for k in changed if k.startswith(MEANING) and k not in config.checkpoint.allow_changed}
    if refused:
        raise ConfigError(
            f"{folder} belongs to a run with other settings: {'; '.join(changed[k] for k in changed if k in refused)}. "
            "Use the same settings to resume it, another run_dir to start anew, or, if this is what you want, "
            f"'checkpoint.allow_changed=[{','.join(sorted(refused))}]'."
        )
    return [text for k, text in changed.items() if k.startswith(MEANING) or not k.startswith(silent)]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found |= _flat(value, name + ".") if isinstance(value, dict) and value else {name: value}
    return found
