"""Hydra's own command line works: its flags, folders of one's own, sweeps, completion, and ranks that stay silent."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalong.recipe.command_line import parse
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError
from tests.runtime.processes import free_port, slurm_like

REPO = Path(__file__).parents[2]
MINI = ("+stage=65k", "+scale=mini")
TINY = ("model.num_hidden_layers=1", "train.steps=1", "train.global_batch_size=1", "data.eval_sequences=0")
STAGE = """
name: 128k
seq_length: 131072
predecessor: 65k
theta_law: dynamic_ntk
global_batch_size: 16
steps: 4
lr: 2.0e-5
"""
MODEL = """
defaults: [mini]
name: narrow
hidden_size: 64
"""
CLUSTER = """
defaults: [cpu]
name: desk
"""


def trainer(
    *words: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "megalong" / "pretrain.py"), *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage, a model and a cluster in a folder outside the checkout."""
    folder = tmp_path_factory.mktemp("mine")
    for name, text in {"stage/128k": STAGE, "model/narrow": MODEL, "cluster/desk": CLUSTER}.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--version"], r"^Hydra 1\.3"),
        (["--hydra-help"], "== Flags =="),
        (["--info", "searchpath", *MINI], r"Config search path(.|\n)*conf"),
        (["--cfg", "hydra", *MINI], r"^hydra:\n  run:\n    dir: \."),
        (["--cfg", "job", "-p", "optimizer", *MINI], r"# @package optimizer\nadam_beta1"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_a_flag_of_hydras_shows_what_hydra_shows(words: list[str], says: str) -> None:
    done = trainer(*words)
    assert done.returncode == 0, done.stderr
    assert re.search(says, done.stdout), done.stdout


def test_cfg_shows_the_resolved_job_of_these_ranks_and_the_first_rank_alone() -> None:
    ranks = [slurm_like(rank, 2, free_port()) for rank in range(2)]
    shown = [trainer(*MINI, "topology.cp=2", "--cfg", env=env).stdout for env in ranks]
    assert re.search(r"topology:\n  policy: auto\n  tp: 1\n  cp: 2\n  pp: 1\n  dp: 1", shown[0])
    assert shown[1] == ""


def test_completion_offers_groups_and_files() -> None:
    done = trainer("-sc", "query=bash", env={"COMP_LINE": "python megalong/pretrain.py +stage="})
    assert set(done.stdout.split()) >= {"+stage=65k", "+stage=1048k"}


@pytest.mark.parametrize("form", ["--config-dir {}", "-cd {}", "hydra.searchpath=[{}]", "hydra.searchpath=[file://{}]"])
def test_a_folder_of_ones_own_is_read_and_its_stage_follows_ours(mine: Path, form: str) -> None:
    words = form.format(mine).split()
    run = run_of([*words, "+stage=128k", "+scale=mini", "model=narrow", "cluster=desk"], 1)
    before = run_of(MINI, 1)
    assert (run.seq_length, run.model.hidden_size, run.config.cluster.name) == (512, 64, "desk")
    assert (run.before.theta, run.before.window) == (before.theta, before.seq_length)
    assert run.theta > before.theta
    assert str(mine) in run.config.searchpath


def test_a_stage_may_follow_a_stage_of_the_same_folder(mine: Path) -> None:
    text = STAGE.replace("128k", "256k").replace("131072", "262144").replace("predecessor: 65k", "predecessor: 128k")
    (mine / "stage" / "256k.yaml").write_text(text)
    run, before = (run_of(["--config-dir", str(mine), f"+stage={n}", "+scale=mini"], 1) for n in ("256k", "128k"))
    assert (run.before.theta, run.before.window) == (before.theta, before.seq_length)


def test_a_folder_in_front_wins_over_ours(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    text = (REPO / "conf/stage/65k.yaml").read_text()
    (tmp_path / "stage" / "65k.yaml").write_text(re.sub(r"steps: .*", "steps: 8", text))
    assert run_of(["--config-dir", str(tmp_path), *MINI], 1).steps == 4
    assert run_of([f"hydra.searchpath=[{tmp_path}]", *MINI], 1).steps == run_of(MINI, 1).steps


def test_a_broken_stage_file_breaks_that_stage_alone_and_is_named(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "broken.yaml").write_text("name: broken\n  seq_length: {")
    words = ["--config-dir", str(tmp_path)]
    assert run_of([*words, *MINI], 1).seq_length == 256
    with pytest.raises(ConfigError, match=r"(?s)\+stage=65k.*\+stage=broken +cannot be read: .*broken\.yaml"):
        run_of(words, 1)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        run_of([*words, "+stage=broken"], 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config-dir", "/nowhere"], "--config-dir /nowhere: there is no such folder"),
        (["hydra.searchpath=[/nowhere]"], "there is no folder /nowhere"),
        (["--config-dir"], "expected one argument"),
        (["--info", "me"], "invalid choice: 'me'"),
        (["--config-path", "conf"], "--config-dir adds a folder"),
    ],
)
def test_a_flag_that_cannot_be_obeyed_is_one_message(words: list[str], says: str) -> None:
    done = trainer(*MINI, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_flags_may_stand_anywhere() -> None:
    line = parse(["+stage=65k", "--config-name", "pretrain", "seed=1", "-m", "train.lr=1"])
    assert line.words == ["+stage=65k", "seed=1", "train.lr=1"]
    assert line.flags.multirun


def test_hydra_run_dir_is_the_run_dir() -> None:
    assert str(run_of([*MINI, "hydra.run.dir=runs/here"], 1).run_dir) == "runs/here"
    assert str(run_of([*MINI, "hydra.run.dir=runs/here", "run_dir=there"], 1).run_dir) == "there"


def test_a_number_of_a_cluster_may_be_given_without_its_source() -> None:
    assert run_of([*MINI, "cluster.nodes=2"], 1).config.cluster.nodes.value == 2


@pytest.mark.long
def test_a_sweep_trains_one_run_after_the_other_in_folders_of_their_own(mine: Path, tmp_path: Path) -> None:
    words = [f"hydra.searchpath={mine}", "-m", "+stage=128k", "+scale=mini", "model=narrow", *TINY]
    done = trainer(*words, "seed=1,2", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "sweep" / n / "metrics.jsonl").read_text()) for n in "01"]
    assert [record["step"] for record in found] == [1, 1]
    assert found[0]["loss"] != found[1]["loss"]


@pytest.mark.long
def test_a_sweep_goes_on_after_a_run_that_fails_and_ends_with_its_code(tmp_path: Path) -> None:
    done = trainer("-m", *MINI, "init_from=/nowhere,/neither", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert done.returncode == 2
    assert re.findall(r"^\[(\d)\] exit code (\d)", done.stdout, re.M) == [("0", "2"), ("1", "2")]


OWN_WORDS = {
    "plan": ["alternatives=3"],
    "verify": [],
    "find_theta": ["budget=500"],
    "prepare_data": ["data=recent", "data.source=a", "data.tokenizer=examples/tokenizer"],
}


def tool_says(tool: str, *words: str) -> str:
    command = [sys.executable, f"tools/{tool}.py", *words, *OWN_WORDS[tool]]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tool", OWN_WORDS)
def test_the_tools_have_the_same_flags(tool: str, mine: Path) -> None:
    (mine / "prepare" / "data").mkdir(parents=True, exist_ok=True)
    (mine / "prepare" / "data" / "recent.yaml").write_text("defaults: [upsampled]\nlong_from: 77\n")
    shown = tool_says(tool, "--config-dir", str(mine), "+stage=128k", "+scale=mini", "--cfg")
    assert re.search(r"^(  name|stage): 128k$", shown, re.MULTILINE)
    if tool == "prepare_data":  # its recipes too, and what they build on
        assert "  long_from: 77\n  long_share: 0.7\n" in shown
    assert str(mine) in tool_says(tool, "--info", "searchpath", f"hydra.searchpath={mine}", "+stage=65k")


@pytest.mark.parametrize("form", ["{}", "[{}]", "file://{}", "['{}']"])
def test_a_searched_folder_needs_no_brackets(form: str, mine: Path) -> None:
    run = run_of([f"hydra.searchpath={form.format(mine)}", "+stage=128k", "+scale=mini"], 1)
    assert (run.config.stage.name, run.config.searchpath[-1]) == ("128k", str(mine))


def test_a_searched_folder_that_is_not_there_is_named_whole() -> None:
    with pytest.raises(ConfigError, match=r"there is no folder /no/where"):
        run_of(["hydra.searchpath=/no/where", *MINI], 1)


def test_a_sweep_of_data_folders_or_searches_is_refused() -> None:
    for tool in ("prepare_data", "find_theta"):
        words = [sys.executable, f"tools/{tool}.py", "-m", *MINI, *OWN_WORDS[tool], "seed=1,2"]
        done = subprocess.run(words, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 2
        assert "once for each" in done.stderr
