"""tools/verify.py: agreement within tolerance passes, a gradient or loss that is off does not."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool
from megalong.training.canary import run_canary
from megalong.training.verify import Measured, canary_told, compare, measure, random_hf, synthetic_samples

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


def test_a_canary_that_was_skipped_is_not_said_to_have_passed(capsys: pytest.CaptureFixture) -> None:
    attention = SimpleNamespace(core_attention="that of Transformer Engine")
    layer = SimpleNamespace(self_attention=attention)
    model: Any = [SimpleNamespace(decoder=SimpleNamespace(layers=[layer]))]
    assert compare(EXPECTED, replace(off(), canary=canary_told(run_canary(model), 4)), 1e-5, 1e-4)
    said = capsys.readouterr().out
    assert "canary     skipped" in said
    assert "canary     passed" not in said


def measured(shared: bool, hf_dir: str, overrides: list[str]) -> Measured:
    """One global batch, or the same with the boundaries of the first sequence given to all."""
    run = run_of(overrides, dist.get_world_size())
    samples = synthetic_samples(run)
    assert samples.document_starts is not None
    starts = samples.document_starts[:1] * len(samples.tokens) if shared else samples.document_starts
    return measure(run, Path(hf_dir), {"": replace(samples, document_starts=starts)})[""]


def test_boundaries_of_another_sequence_are_noticed(ranks: RankPool, tmp_path: Path) -> None:
    overrides = ["+stage=65k", "+scale=mini", "topology.cp=2", "model.num_hidden_layers=1", "stage.seq_length=16384"]
    overrides += ["precision=fp32", "attention.document_mask=intra", "train.global_batch_size=2"]
    hf_dir = str(random_hf(run_of(overrides, 2), tmp_path))
    right, wrong = (ranks.run(measured, 2, shared, hf_dir, overrides)[0] for shared in (False, True))
    assert not compare(right, wrong, 1e-5, 1e-4)


def test_the_command_proves_a_layout_on_ranks_of_its_own() -> None:
    small = ["model.num_hidden_layers=1", "stage.seq_length=16384"]
    command = [sys.executable, "tools/verify.py", "+stage=65k", "+scale=mini", "topology.cp=2", *small]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert "canary     passed: forward and backward, all 2 context-parallel ranks" in run.stdout
    assert "PASSED: tolerance" in run.stdout


def test_a_mistake_ends_with_code_2() -> None:
    command = [sys.executable, "tools/verify.py", "+stage=65k", "+scale=mini", "topology.cp=3"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2
    assert run.stderr.count("megalong: ") == 1
