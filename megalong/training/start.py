"""Where do the weights and the data of a run come from? Decided and checked before any process group exists.

A run resumes from its own newest checkpoint when there is one; otherwise it starts from `init_from`; at mini scale
random weights and a small corpus of real text stand in for what is missing, and the run says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.checkpoint import pointer
from megalong.checkpoint.info import read_info
from megalong.config.schema import Config, ModelConfig
from megalong.data.builtin import builtin_corpus
from megalong.data.dataset import SequenceDataset, open_dataset
from megalong.model.llama import model_from_hf, read_hf_config
from megalong.recipe.compose import from_yaml
from megalong.recipe.stages import predecessor_point
from megalong.rope.theta import RotaryPoint, check_follows
from megalong.runtime.errors import CheckpointError, ConfigError
from megalong.runtime.files import PARTIAL
from megalong.training.same_run import check_same_run

CACHE = Path.home() / ".cache" / "megalong"
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope_scaling",
)


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    kind: str
    """resume, megatron, hf or random."""
    path: Path | None
    text: str
    """How the run tells it."""
    hf_config: dict[str, Any] | None = None
    """config.json that the weights came with; what the model does not define is carried to the export."""


def plan_start(config: Config) -> Start:
    """Decide where weights come from and check that they may.

    Raises:
        ConfigError: a real stage without `init_from`, or a run_dir that belongs to something else.
        CheckpointError: what `init_from` names is missing, half-written or of another model.
        ThetaError: its theta or window is not the predecessor's.
    """
    assert config.run_dir is not None
    root = Path(config.run_dir) / "checkpoints"
    found = pointer.newest(root)
    if found is not None and config.checkpoint.resume:
        changed = check_same_run(config, found)
        text = f"resuming from {found}" + "".join(f"\n  changed: {line}" for line in changed)
        return Start("resume", found, text, read_info(found).hf_config)
    if found is not None:
        raise ConfigError(
            f"checkpoint.resume=false, but {root} already holds {found.name}. Choose another run_dir, or resume."
        )
    if (root / pointer.POINTER).exists() or any(p for p in root.glob("step_*") if not p.name.endswith(PARTIAL)):
        raise CheckpointError(
            f"{root} has checkpoints, but none that is whole: the run cannot be resumed and will not be overwritten. "
            "Restore one, or choose another run_dir."
        )
    if config.init_from is None:
        return _without_init(config)
    path = Path(config.init_from)
    if not path.is_dir():
        raise CheckpointError(f"init_from={path}: there is no such folder. {_wants(config)}")
    if (path / "config.json").is_file() and not (path / pointer.COMMIT_MARK).is_file():
        kind, hf_config = "hf", read_hf_config(path)
    else:
        path = _finished(pointer.resolve(path), path)
        kind, hf_config = "megatron", read_info(path).hf_config
    where = f"init_from={path}"
    model = model_from_hf(hf_config, where)
    _check_model(config, model, where)
    expected = predecessor_point(config.stage, config.model, config.scale)
    check_follows(RotaryPoint(model.rope_theta, model.max_position_embeddings), expected, where)
    return Start(kind, path, f"weights from {path}", hf_config)


def _finished(folder: Path, given: Path) -> Path:
    """The checkpoint that a run_dir stands for must be the end of its stage; one that is named itself may be any.

    Raises:
        CheckpointError: the stage in that run_dir has not been trained to its end.
    """
    info = read_info(folder)
    config = folder / "config.yaml"
    if folder == given or not config.is_file() or pointer.step_of(folder) is None:
        return folder
    steps = from_yaml(config.read_text(encoding="utf-8")).train.steps
    if steps is not None and info.step < steps:
        raise CheckpointError(
            f"init_from={given}: its stage {info.stage} has only come to step {info.step} of {steps}. Let it finish, "
            f"or name the checkpoint itself: init_from={folder}."
        )
    return folder


def _without_init(config: Config) -> Start:
    if config.scale.name == "full":
        raise ConfigError(f"init_from is missing. {_wants(config)}")
    return Start(
        "random", None, f"no init_from: random weights (seed {config.seed}), as scale={config.scale.name} allows"
    )


def _wants(config: Config) -> str:
    stage, point = config.stage, predecessor_point(config.stage, config.model, config.scale)
    what = f"window {point.window:,}, theta {point.theta:,.0f}"
    if stage.predecessor is None:
        return (
            f"Stage {stage.name} starts from the Hugging Face base ({what}): give init_from=<its folder>, with "
            "config.json and *.safetensors."
        )
    return (
        f"Stage {stage.name} starts from stage {stage.predecessor} ({what}): give init_from=<run_dir of "
        f"{stage.predecessor}>, one of its checkpoints, or its Hugging Face export."
    )


def _check_model(config: Config, found: ModelConfig, where: str) -> None:
    differences = [
        f"{name} {getattr(found, name)} (configured {getattr(config.model, name)})"
        for name in SHAPE
        if getattr(found, name) != getattr(config.model, name)
    ]
    if differences:
        raise CheckpointError(
            f"{where} is another model than model={config.model.name}: {', '.join(differences)}. "
            "Choose another model=..., or override these fields (model.<field>=...)."
        )


def plan_data(config: Config, announce: list[str]) -> tuple[SequenceDataset, SequenceDataset | None]:
    """Open the training and the held-out sequences.

    Args:
        announce: receives what the user should know.

    Raises:
        ConfigError: a real stage without `data.path`.
        DataError: the folder is missing, damaged, or cut for another window.
    """
    if config.data.path is None:
        if config.scale.name == "full":
            raise ConfigError(
                f"data.path is missing. Stage {config.stage.name} needs sequences of {config.stage.seq_length:,} "
                "tokens: make them with `python tools/prepare_data.py`, then give data.path=<its folder>."
            )
        config.data.path = str(builtin_corpus(CACHE, config.stage.seq_length, config.model.vocab_size))
        announce.append(f"no data.path: Python sources of this machine, in {config.data.path}")

    def opened(split: str, at_least: int) -> SequenceDataset:
        length, vocabulary = config.stage.seq_length, config.model.vocab_size
        assert config.data.path is not None
        return open_dataset(config.data.path, split, seq_length=length, vocab_size=vocabulary, min_sequences=at_least)

    train = opened("train", config.train.global_batch_size or 1)
    return train, opened("eval", config.data.eval_sequences) if config.data.eval_sequences else None
