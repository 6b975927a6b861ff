"""Makes the folder that the commands of the table run in."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

STAGE = """name: {name}
seq_length: 131072
predecessor: 65k
theta_law: dynamic_ntk
"""
REST = """global_batch_size: 16
steps: 4
lr: 2.0e-5
"""


def make_world(folder: Path, repo: Path) -> None:
    """Everything that tests/mistakes/table.py names; in a process of its own."""
    import os

    from megalong.data.builder import build
    from megalong.data.tokenizer import load_tokenizer
    from tests.data.folders import COUNTING, counting_documents
    from tests.llamas import hf_config, save_hf

    os.chdir(folder)
    (folder / "log").touch()
    sys.stdout = sys.stderr = (folder / "log").open("w")
    for name in ("conf", "examples", "slurm"):
        (folder / name).symlink_to(repo / name)
    mini = hf_config(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=1,
        head_dim=32,
        max_position_embeddings=32,
    )
    save_hf(folder / "base", mini)
    save_hf(folder / "wide", {**mini, "hidden_size": 64})
    for name in ("base", "wide"):
        shutil.copy(repo / "examples/tokenizer/tokenizer.json", folder / name)
    shutil.copytree(folder / "base", folder / "half")
    weights = folder / "half" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    for name, window, tokenizer in (
        ("data", 256, load_tokenizer(repo / "examples/tokenizer").info),
        ("other", 256, COUNTING),
        ("short", 64, COUNTING),
    ):
        documents = counting_documents([257] * 40) + counting_documents([257] * 2, is_held_out=True)
        build(documents, folder / name, tokenizer=tokenizer, seq_length=window, source="counting")
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("Some words.\n" * 100)
    (folder / "bin").mkdir()  # a PATH without sbatch
    for name in ("bash", "dirname", "env", "sed"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    (folder / "file").write_text("a file\n")
    stages = folder / "mine" / "stage"
    stages.mkdir(parents=True)
    (stages / "yaml.yaml").write_text(STAGE.format(name="yaml").replace("predecessor: 65k", "predecessor: [65k"))
    (stages / "keyless.yaml").write_text(STAGE.format(name="keyless") + "steps: 4\n")
    typo = STAGE.format(name="typo") + REST + "sequence_length: 131072\n"
    (stages / "typo.yaml").write_text(typo)
    sys.argv = [
        str(repo / "megalong" / "pretrain.py"),
        *["+stage=65k", "+scale=mini", "model.num_hidden_layers=1", "train.steps=1", "train.global_batch_size=2"],
        *["data.eval_sequences=0", "run_dir=run"],
    ]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise AssertionError((folder / "log").read_text()) from end
    sys.stdout.close()
    sys.stdout = sys.__stdout__
    (folder / "log").unlink()
