"""Transformer Engine's layers and FusedAdam are called as they want it, and train what our own do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `trained_by_transformer_engine.py` saw with the stand-in, whose signatures are the package's own."""
    command = [sys.executable, "-m", "tests.model.trained_by_transformer_engine", str(tmp_path_factory.mktemp("te"))]
    paths = os.pathsep.join(map(str, (REPO / "tests" / "fakes" / "te", REPO)))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_it_trains_what_our_layers_and_torchs_adam_train(found: dict[str, Any]) -> None:
    """With biases, and YaRN's attention factor in the softmax scale; loss and gradient norm of every step."""
    assert len(found["alone"]) == 4
    for whose, steps in (("theirs", 2), ("then theirs", 4)):
        for step, expected in zip(found[whose], found["alone"][:steps], strict=True):
            assert step == pytest.approx(expected, rel=1e-6), whose


def test_either_goes_on_from_the_others_checkpoint(found: dict[str, Any]) -> None:
    """Weights, moments and step counts; a key's bias has no gradient but rounding, which Adam scales up."""
    assert {name for name, distance in found["state"].items() if distance > 1e-5} <= {
        f"model.module.decoder.layers.{layer}.self_attention.linear_qkv.bias" for layer in (0, 1)
    } | {name for name in found["state"] if name.startswith("optimizer.1.")}
    assert max(found["state"].values()) < 1e-3


def test_what_was_saved_before_the_first_update_can_be_gone_on_from(found: dict[str, Any]) -> None:
    """The first step was left out and saved; two were done after it."""
    assert found["updates after none"] == 2


def test_attention_is_given_its_context_parallel_groups(found: dict[str, Any]) -> None:
    ring = [4, 5, 6, 7]
    whole = {algorithm: [ring, ring] for algorithm in ("p2p", "a2a", "all_gather")}
    assert found["context parallel"] == whole | {"a2a+p2p": [ring, [4, 5], [5, 7]]}
