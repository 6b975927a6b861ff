"""The tool searches in the training layout, goes on where it was killed, and leaves a stage file for the trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.image import imread
from omegaconf import OmegaConf

from megalong.config.schema import StageConfig
from tests.data.folders import make_folder
from tests.llamas import hf_config, save_hf

ROOT = Path(__file__).resolve().parents[2]
MINI = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "head_dim": 32}


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("theta")
    (folder / "base").mkdir()
    save_hf(folder / "base", hf_config(**MINI, max_position_embeddings=32, initializer_range=0.02))
    make_folder(folder / "data", [900] * 8, 256, [900, 900])
    return [
        *("+stage=65k", "+scale=mini", "model.num_hidden_layers=1", f"init_from={folder / 'base'}"),
        *(f"data.path={folder / 'data'}", f"out={folder / 'found'}", "candidates=3", "seeds=1", "precision=fp32"),
        *("data.eval_sequences=1", "train.global_batch_size=1", "train.recompute=none"),
    ]


def start(words: list[str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tools" / "find_theta.py"), *words, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.long
def test_a_killed_search_goes_on_and_the_stage_it_leaves_is_one_that_can_be_trained(words):
    out = Path(next(w for w in words if w.startswith("out="))[4:])
    process = start(words, "budget=9000")
    while process.poll() is None and not (out / "trials.jsonl").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = (out / "trials.jsonl").read_text().splitlines()
    assert before
    said, error = (process := start(words, "budget=9000")).communicate(timeout=250)
    assert process.returncode == 0, error
    assert f"{len(before) - (not before[-1].endswith('}'))} measurements are there already" in said
    trials = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    assert len({(t["theta"], t["steps"], t["seed"]) for t in trials}) == len(trials)
    assert trials[0] == json.loads(before[0])
    report = json.loads((out / "report.json").read_text())
    assert report["tokens"] == sum(t["tokens"] for t in trials) <= 9000
    assert imread(out / "loss_against_theta.png").ndim == 3
    stage = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(StageConfig), OmegaConf.load(out / "stage" / "65k-found.yaml"))
    )
    assert isinstance(stage, StageConfig)
    assert (stage.theta_law, stage.theta, stage.seq_length) == ("fixed", report["theta"], 65_536)
    trainer = [sys.executable, str(ROOT / "megalong" / "pretrain.py"), "--config-dir", str(out), "--cfg", "job"]
    taken = subprocess.run([*trainer, "+stage=65k-found", "+scale=mini"], capture_output=True, text=True, timeout=250)
    assert f"theta: {report['theta']}" in taken.stdout, taken.stderr
    _, refused = (process := start(words, "budget=9001")).communicate(timeout=250)
    assert process.returncode == 2
    assert "holds a search with other settings" in refused


def test_a_budget_too_small_is_refused_before_anything_is_written(words, tmp_path):
    _, refused = (process := start(words, "budget=500", f"out={tmp_path / 'none'}")).communicate(timeout=250)
    assert process.returncode == 2
    assert "too small to decide" in refused
    assert not (tmp_path / "none").exists()
