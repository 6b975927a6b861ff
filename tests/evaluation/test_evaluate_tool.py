"""The tool sets checkpoints side by side, writes what it says, and answers a mistake in one message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from megalong.evaluation.haystack import BUILTIN
from tests.evaluation.models import save_model

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    save_model(folder / "long")
    save_model(folder / "base", max_position_embeddings=64)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text(BUILTIN.read_text())
    return folder


def test_two_checkpoints_beside_their_base(folders):
    out = folders / "out"
    done = run(
        *(folders / "long", folders / "base", "--tasks", "needle,variables", "--lengths", "512", "--depths", "0,1"),
        *("--samples", "1", "--documents", folders / "text", "--window", "256", "--count", "1"),
        *("--base", folders / "base", "--precision", "fp32", "--out", out),
    )
    assert done.returncode == 0, done.stderr
    assert "has a window of 64 tokens and theta 10,000; it is asked about 512" in done.stderr
    found = json.loads((out / "evaluation.json").read_text())
    first, second = found["checkpoints"]
    assert [(c["task"], c["length"], c["depth"]) for c in first["cells"]] == [
        ("needle", 512, 0.0),
        ("needle", 512, 1.0),
        ("variables", 512, None),
    ]
    # the same weights and theta: the same numbers
    assert first["cells"] == second["cells"]
    assert first["position"]["last_quarter"] == second["position"]["last_quarter"] > 0
    assert first["long"]["of"] == 256 + 1 - 2 * 64
    assert found["base"]["short_loss"] == first["short_loss"]
    assert "above the base" in done.stdout
    assert "ETA 0 s" in done.stdout
    assert imread(out / "needle.png").shape[1] > 800
    (events,) = (out / "tensorboard").iterdir()
    assert b"evaluation/needle" in events.read_bytes()


def test_a_sample_is_written_and_a_mistake_is_one_message(folders):
    done = run("sample", folders / "long", "--length", 440, "--depth", 0.2, "--tokens", 3, "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert "true:   " in done.stdout
    assert "model: " in done.stdout
    wrong = run(folders / "text")
    assert wrong.returncode == 2
    assert "neither a Hugging Face directory" in wrong.stderr
    assert "Traceback" not in wrong.stderr
