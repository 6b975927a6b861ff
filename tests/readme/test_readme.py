"""README's commands run as printed, in order, in a fresh clone; those of GPUs at mini sizes, those of clusters dry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalong.runtime.ranks import warm_processes
from tests.convert.test_from_meta import meta_tensors, write
from tests.llamas import hf_config, save_hf
from tests.readme.commands import TREATMENTS, commands, shown, treatment_of

REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text()
WINDOWS = {"65k": 256, "262k": 1024, "1048k": 4096}


def make_inputs(clone: Path) -> None:
    """What README's reader has: a base model, in Meta's files too, texts, and data folders; all of them small."""
    from megalong.data.prepare import prepare

    os.chdir(clone)
    base, texts = clone / "Meta-Llama-3-8B", clone / "texts"
    mini = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
    save_hf(base, hf_config(**mini, max_position_embeddings=32))
    shutil.copy("examples/tokenizer/tokenizer.json", base)
    write(base / "original", meta_tensors(), 1)
    texts.mkdir()
    for path in sorted((clone / "megalong").glob("[rt]*/*.py")):
        for i, part in enumerate(path.read_text().split("\n\n\n")):  # documents enough for a hundredth to be held out
            (texts / f"{path.parent.name}-{path.stem}-{i}.txt").write_text(part)
    for name, window in WINDOWS.items():
        prepare(texts, clone / "data" / name, base, window, eval_fraction=0.2, progress=False)
    shutil.copytree(clone / "examples" / "slimpajama", clone / "SlimPajama" / "train")
    (clone / "runs").mkdir()
    (clone / "runs" / "1048k").symlink_to("262k")  # the stages between them are trained elsewhere


def test_every_command_has_a_treatment_and_every_treatment_a_command() -> None:
    found = [treatment_of(command) for command in commands(README)]
    assert [t for t in TREATMENTS if t not in found] == []


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_command_runs_as_printed(tmp_path: Path) -> None:
    clone = tmp_path / "megalong"
    subprocess.run(["git", "clone", "-q", str(REPO), str(clone)], check=True)
    made = warm_processes().Process(target=make_inputs, args=(clone,))
    made.start()
    made.join(200)
    assert made.exitcode == 0
    env = dict(os.environ) | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(clone),  # the environment's editable install is of another checkout
    }
    for command in commands(README):
        treatment = treatment_of(command)
        if treatment.skipped:
            subprocess.run(["bash", "-n", "-c", command.text], check=True)
            continue
        begun = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", treatment.applied(command)], cwd=clone, env=env, capture_output=True, text=True
        )
        print(f"{time.monotonic() - begun:6.1f} s  {treatment.applied(command).splitlines()[0]}")
        said = f"{command.plain}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert done.returncode == treatment.code, said
        assert "Traceback" not in done.stderr, said
        missing = [line for line in shown(command.output) if line not in shown(done.stdout)]
        assert not missing, f"{said}\nREADME shows, and it does not print: {missing}"
