"""Where the weights of a run come from, decided and checked before any process group exists.

A run resumes from its own newest checkpoint when there is one; otherwise it starts from `init_from`; at mini scale
random weights stand in for what is missing, and the run says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalong.checkpoint import pointer
from megalong.checkpoint.committed import COMMIT_MARK
from megalong.checkpoint.info import HF_FILES, read_info
from megalong.config.schema import ModelConfig
from megalong.convert.hf_folder import read_config
from megalong.model.llama import model_from_hf
from megalong.recipe.saved import saved_config
from megalong.rope.theta import RotaryPoint, check_follows
from megalong.run import Run
from megalong.runtime.errors import CheckpointError, ConfigError
from megalong.runtime.files import PARTIAL
from megalong.training.same_run import check_same_run

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
)


@dataclass(frozen=True)
class Random:
    """No weights; allowed at mini scale."""

    text: str
    """How the run tells it."""
    hf_config: dict[str, Any] | None = None
    carried: Path | None = None


@dataclass(frozen=True)
class FromHuggingFace:
    """Weights of a Hugging Face folder."""

    path: Path
    hf_config: dict[str, Any]
    """config.json that the weights came with; what the model does not define is carried to the export."""

    @property
    def text(self) -> str:
        """How the run tells it."""
        return f"weights from {self.path}"

    @property
    def carried(self) -> Path:
        """Folder with the tokenizer and the other files that travel along to the export."""
        return self.path


@dataclass(frozen=True)
class FromMegatron(FromHuggingFace):
    """Weights, and where it has them their fp32 masters, of a Megatron checkpoint."""

    tokens_before: int = 0
    """Tokens that the stages before this one read."""

    @property
    def carried(self) -> Path:
        """Folder with the tokenizer and the other files that travel along to the export."""
        return self.path / HF_FILES


@dataclass(frozen=True)
class Resumed(FromMegatron):
    """A checkpoint of this run itself, with its optimizer and its place in the data."""

    changed: tuple[str, ...] = ()
    """Settings that are others than before, one line each."""

    @property
    def text(self) -> str:
        """How the run tells it."""
        return f"resuming from {self.path}" + "".join(f"\n  changed: {line}" for line in self.changed)


Start = Random | FromHuggingFace | FromMegatron | Resumed


def plan_start(run: Run) -> Start:
    """Decide where weights come from and check that they may.

    Raises:
        ConfigError: a real stage without `init_from`, or a run_dir that belongs to something else.
        CheckpointError: what `init_from` names is missing, half-written or of another model.
        ThetaError: its theta or window is not the predecessor's.
    """
    config, root = run.config, run.run_dir / "checkpoints"
    found = pointer.newest(root)
    if found is not None and config.checkpoint.resume:
        changed = tuple(check_same_run(config, found))
        info = read_info(found)
        return Resumed(found, info.hf_config, info.tokens_before, changed)
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
        return _without_init(run)
    path = Path(config.init_from)
    if not path.is_dir():
        raise CheckpointError(f"init_from={path}: there is no such folder. {_wants(run)}")
    if (path / "config.json").is_file() and not (path / COMMIT_MARK).is_file():
        start = FromHuggingFace(path, read_config(path))
    else:
        try:
            found = pointer.resolve(path)
        except CheckpointError as error:
            raise CheckpointError(f"init_from={path}: {error} {_wants(run)}") from error
        path = _finished(found, path)
        info = read_info(path)
        start = FromMegatron(path, info.hf_config, info.tokens)
    where = f"init_from={path}"
    model = model_from_hf(start.hf_config, where)
    _check_model(run, model, where)
    check_follows(RotaryPoint(model.rope_theta, model.max_position_embeddings), run.before, where)
    return start


def _finished(folder: Path, given: Path) -> Path:
    """The checkpoint that a run_dir stands for must be the end of its stage; one that is named itself may be any.

    Raises:
        CheckpointError: the stage in that run_dir has not been trained to its end.
    """
    info = read_info(folder)
    config = folder / "config.yaml"
    if folder == given or not config.is_file() or pointer.step_of(folder) is None:
        return folder
    steps = saved_config(folder).train.steps
    if steps is not None and info.step < steps:
        raise CheckpointError(
            f"init_from={given}: its stage {info.stage} has only come to step {info.step} of {steps}. Let it finish, "
            f"or name the checkpoint itself: init_from={folder}."
        )
    return folder


def _without_init(run: Run) -> Random:
    config = run.config
    if config.scale.name == "full":
        raise ConfigError(f"init_from is missing. {_wants(run)}")
    return Random(f"no init_from: random weights (seed {config.seed}), as scale={config.scale.name} allows")


def _wants(run: Run) -> str:
    stage = run.config.stage
    what = f"window {run.before.window:,}, theta {run.before.theta:,.0f}"
    if stage.predecessor is None:
        return (
            f"Stage {stage.name} starts from the Hugging Face base ({what}): give init_from=<its folder>, with "
            "config.json and *.safetensors."
        )
    return (
        f"Stage {stage.name} starts from stage {stage.predecessor} ({what}): give init_from=<run_dir of "
        f"{stage.predecessor}>, one of its checkpoints, or its Hugging Face export."
    )


def _check_model(run: Run, found: ModelConfig, where: str) -> None:
    wanted = run.model
    differences = [
        f"{name} {getattr(found, name)} (configured {getattr(wanted, name)})"
        for name in SHAPE
        if getattr(found, name) != getattr(wanted, name)
    ]
    if found.rope_scaling != run.rope_scaling_before:
        differences.append(f"rope_scaling {found.rope_scaling} (configured {run.rope_scaling_before})")
    if differences:
        raise CheckpointError(
            f"{where} is another model than model={wanted.name}: {', '.join(differences)}. "
            "Choose another model=..., or override these fields (model.<field>=...)."
        )
