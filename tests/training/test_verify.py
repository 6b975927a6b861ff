"""tools/verify.py: agreement within tolerance passes, a gradient or loss that is off does not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalong.training.verify import Measured, compare

REPO = Path(__file__).parents[2]
EXPECTED = Measured(2.0, {"model.norm.weight": torch.ones(8), "lm_head.weight": torch.full((4, 8), 2.0)})


def off(loss: float = 0.0, gradient: float = 0.0) -> Measured:
    gradients = {name: grad.clone() for name, grad in EXPECTED.gradients.items()}
    gradients["lm_head.weight"][0, 0] += gradient
    return Measured(EXPECTED.loss + loss, gradients)


def test_what_agrees_passes(capsys: pytest.CaptureFixture) -> None:
    assert compare(EXPECTED, off(1e-7, 1e-6), 1e-5, 1e-4)
    assert "PASSED" in capsys.readouterr().out


@pytest.mark.parametrize("found", [off(loss=1e-3), off(gradient=0.1), off(gradient=float("nan"))])
def test_what_does_not_agree_fails_and_the_worst_gradient_is_named(
    found: Measured, capsys: pytest.CaptureFixture
) -> None:
    assert not compare(EXPECTED, found, 1e-5, 1e-4)
    assert "FAILED" in capsys.readouterr().out


def test_the_command_proves_a_layout_on_ranks_of_its_own() -> None:
    small = ["model.num_hidden_layers=1", "stage.seq_length=16384"]
    command = [sys.executable, "tools/verify.py", "+stage=65k", "+scale=mini", "topology.cp=2", *small]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "canary     passed" in run.stdout
    assert "PASSED: tolerance" in run.stdout


def test_a_mistake_ends_with_code_2() -> None:
    command = [sys.executable, "tools/verify.py", "+stage=65k", "+scale=mini", "topology.cp=3"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert run.stderr.count("megalong: ") == 1
