"""A mistake in what a run starts from is told in one message, with an exit code, and nothing is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from megalong.checkpoint import pointer
from megalong.checkpoint.checksums import write_checksums
from megalong.checkpoint.info import CheckpointInfo, write_info
from megalong.data.builtin import builtin_corpus
from megalong.recipe.compose import to_yaml
from megalong.recipe.resolve import run_of
from megalong.run import Run
from megalong.runtime.errors import CheckpointError, ConfigError, DataError, ThetaError
from megalong.runtime.files import sha256_of
from megalong.training.sequences import CACHE, open_data
from megalong.training.start import FromHuggingFace, Random, Resumed, plan_start

REPO = Path(__file__).parents[2]


def mini(tmp_path: Path, *overrides: str, stage: str = "65k") -> Run:
    return run_of([f"+stage={stage}", "+scale=mini", f"run_dir={tmp_path / 'run'}", *overrides], 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained Hugging Face Llama of model=mini's shape."""
    model = run_of(["+stage=65k", "+scale=mini"], 1).model
    folder = tmp_path_factory.mktemp("hf") / "base"
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    shape = {k: getattr(model, k) for k in keys + more}
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, rope_parameters=rope)).save_pretrained(folder)
    return folder


def edited(base: Path, target: Path, **changes: object) -> Path:
    """The base with other values in config.json."""
    target.mkdir()
    (target / "model.safetensors").symlink_to(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_mini_scale_starts_from_random_weights_and_says_so(tmp_path: Path) -> None:
    start = plan_start(mini(tmp_path))
    assert isinstance(start, Random)
    assert "random weights" in start.text


def test_the_base_is_accepted_by_the_first_stage(tmp_path: Path, base: Path) -> None:
    assert type(plan_start(mini(tmp_path, f"init_from={base}"))) is FromHuggingFace


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ("65k", "Hugging Face base .window 8,192, theta 500,000.: give init_from"),
        ("524k", "init_from=<run_dir of 262k>"),
    ],
)
def test_a_real_stage_says_what_it_starts_from(tmp_path: Path, stage: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_start(run_of([f"+stage={stage}", f"run_dir={tmp_path}"]))


def test_a_real_stage_says_what_data_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"data\.path is missing.*65,536 tokens.*prepare_data"):
        open_data(run_of(["+stage=65k"]), [])


def test_weights_whose_theta_does_not_follow_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ThetaError, match=r"theta 10000,.*follows one with theta 362987 at 256"):
        plan_start(mini(tmp_path, f"init_from={base}", stage="262k"))
    rope = {"rope_type": "default", "rope_theta": 12345.0}
    other = edited(base, tmp_path / "other", rope_parameters=rope, rope_theta=12345.0)
    with pytest.raises(ThetaError, match="12345"):
        plan_start(mini(tmp_path, f"init_from={other}"))


def test_weights_of_another_model_are_refused_field_by_field(tmp_path: Path, base: Path) -> None:
    other = edited(base, tmp_path / "other", intermediate_size=512)
    with pytest.raises(CheckpointError, match=r"intermediate_size 512 \(configured 384\)"):
        plan_start(mini(tmp_path, f"init_from={other}"))


def test_a_missing_or_half_written_start_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        plan_start(mini(tmp_path, f"init_from={tmp_path / 'nowhere'}"))
    half = tmp_path / "half" / "checkpoints" / "step_00000010.partial"
    half.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"only half-written: step_00000010\.partial"):
        plan_start(mini(tmp_path, f"init_from={tmp_path / 'half'}"))


def whole_checkpoint(run_dir: Path, run: Run) -> Path:
    """The small files of a checkpoint, as a run leaves them."""
    folder = pointer.folder_of(run_dir / "checkpoints", 5)
    folder.mkdir(parents=True)
    write_info(folder, CheckpointInfo(hf_config={}, stage="65k", seq_length=256, theta=1.0))
    (folder / "config.yaml").write_text(to_yaml(run.config))
    (folder / "metadata.json").write_text("{}")
    write_checksums(folder, {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in folder.iterdir()})
    return folder


def test_a_pointer_to_nothing_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (root / "latest").write_text("step_00000010\n")
    with pytest.raises(CheckpointError, match="none that is whole"):
        plan_start(mini(tmp_path))


def test_a_resume_under_other_settings_lists_what_changed(tmp_path: Path) -> None:
    whole_checkpoint(tmp_path / "run", mini(tmp_path))
    assert isinstance(plan_start(mini(tmp_path)), Resumed)
    with pytest.raises(ConfigError, match=r"train\.lr 0\.0005 -> 0\.5; seed 1234 -> 7"):
        plan_start(mini(tmp_path, "train.lr=0.5", "seed=7"))
    told = plan_start(mini(tmp_path, "train.lr=0.5", "seed=7", "checkpoint.allow_changed=[train.lr,seed]"))
    assert "changed: train.lr 0.0005 -> 0.5" in told.text
    with pytest.raises(ConfigError, match=r"seed 1234 -> 7\..*allow_changed=\[seed\]"):
        plan_start(mini(tmp_path, "train.lr=0.5", "seed=7", "checkpoint.allow_changed=[train.lr]"))
    with pytest.raises(ConfigError, match="already holds step_00000005"):
        plan_start(mini(tmp_path, "checkpoint.resume=false"))


def test_a_resume_on_another_layout_is_the_same_run(tmp_path: Path) -> None:
    whole_checkpoint(tmp_path / "run", mini(tmp_path))
    overrides = ["+stage=65k", "+scale=mini", f"run_dir={tmp_path / 'run'}", "topology.cp=4"]
    start = plan_start(run_of(overrides, 4))
    assert isinstance(start, Resumed)
    assert "changed: topology.cp 1 -> 4" in start.text


def test_a_run_that_has_not_come_to_its_end_is_no_start_for_the_next_stage(tmp_path: Path) -> None:
    folder = whole_checkpoint(tmp_path / "run", mini(tmp_path))
    run = mini(tmp_path / "next", f"init_from={tmp_path / 'run'}", stage="262k")
    with pytest.raises(CheckpointError, match=r"has only come to step 0 of 15\. Let it finish, or name the checkpoint"):
        plan_start(run)
    with pytest.raises(CheckpointError) as caught:  # named itself it is taken, and then its model is looked at
        plan_start(mini(tmp_path / "next", f"init_from={folder}", stage="262k"))
    assert "has only come" not in str(caught.value)


def test_data_of_another_window_or_damaged_is_refused(tmp_path: Path) -> None:
    folder = builtin_corpus(CACHE, 1024, mini(tmp_path).model.vocab_size)
    with pytest.raises(DataError, match="window of 1,024 tokens and the run has 256"):
        open_data(mini(tmp_path, f"data.path={folder}"), [])
    with pytest.raises(DataError, match="nowhere"):
        open_data(mini(tmp_path, f"data.path={tmp_path / 'nowhere'}"), [])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Which stage?"),
        (["+stage=1048k"], "wants 512 GPUs"),
        (["+stage=65k", "topology=auto"], "does not fit"),
        (["+stage=65k", "+scale=mini", "init_from=/nowhere"], "no such folder"),
        (["+stage=65k", "+scale=mini", "stage.theta=5"], "contradicts"),
    ],
)
def test_the_command_ends_with_one_message_code_2_and_nothing_written(
    tmp_path: Path, arguments: list[str], says: str
) -> None:
    run = subprocess.run(
        [
            sys.executable,
            str(REPO / "megalong/pretrain.py"),
            *arguments,
            *([f"run_dir={tmp_path / 'run'}"] * bool(arguments)),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stderr.count("megalong: ") == 1
    assert says in run.stderr
    assert "Traceback" not in run.stderr
    assert list(tmp_path.iterdir()) == []
