"""The command for a stage: the manual's example as it stands, the same words as training, refusals before work."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalong.data.manifest import read_manifest
from megalong.data.pipeline.checking import check_folder
from megalong.data.pipeline.run import prepare_stage
from megalong.data.prepare import prepare
from megalong.recipe.preparation import job_of, read_settings, recipe_names
from megalong.runtime.errors import ConfigError, DataError, UserError
from tests.data import corpus

REPO = Path(__file__).parents[2]
EXAMPLE = [
    *("+stage=65k", "+scale=mini", "data=slimpajama", f"data.source={REPO}/examples/slimpajama"),
    f"data.tokenizer={REPO}/examples/tokenizer",
]


def commands_of_the_manual() -> list[str]:
    """The first block of commands in docs/data.md."""
    text = (REPO / "docs" / "data.md").read_text()
    block = re.search(r"```\n(python tools/prepare_data.py.*?)```", text, re.DOTALL)
    assert block is not None
    return [line for line in block[1].replace("\\\n", " ").splitlines() if line.strip()]


def test_the_manuals_first_example_runs_as_written(tmp_path):
    for name in ("tools", "examples", "conf", "megalong"):
        (tmp_path / name).symlink_to(REPO / name)
    said = ""
    for command in commands_of_the_manual():
        words = command.split()
        assert words[0] == "python"
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "60 sequences of 256 tokens to train on" in said
    assert "checksums, ids and boundaries are sound" in said
    assert "boundary at" in said
    assert re.search(r"RedPajamaGithub +[\d,]+ +\d+\.\d+%", said)
    assert (tmp_path / "outputs" / "data" / "65k-lengths.png").stat().st_size > 1000


def test_the_stage_says_window_and_budget_as_it_says_them_to_training():
    plan = job_of([*EXAMPLE, "data.out=x", "train.steps=3", "train.global_batch_size=5", "seed=9"])
    assert (plan.stage, plan.seq_length, plan.sequences, plan.seed) == ("65k", 256, 15, 9)
    full = job_of(["+stage=1048k", "data.source=a", f"data.tokenizer={REPO}/examples/tokenizer"])
    assert (full.seq_length, full.sequences, str(full.out)) == (2**20, 800, "data/1048k")


def test_recipes_are_chosen_and_changed_and_paths_are_taken_as_they_stand():
    assert {"slimpajama", "upsampled", "prolong", "recall"} <= set(recipe_names())
    for name in recipe_names():
        read_settings([f"data={name}"])
    said = read_settings(
        ["data=upsampled", "data.long_from=8192", "data.source=a b/c=d,e", "data.shares={a: 0.5, b: 0.5}"]
    )
    assert (said.long_from, said.long_share, said.source) == (8192, 0.7, "a b/c=d,e")
    assert said.shares == {"a": 0.5, "b": 0.5}
    assert read_settings(["data.recall.share=0.1"]).recall.share == 0.1
    assert read_settings(["data.sources.books=/x", "data.source_key=null"]).sources == {"books": "/x"}


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["data.sorce=x"], r"no setting data\.sorce\. Did you mean data\.source"),
        (["data=other"], "choose one of .*upsampled"),
        (["data.min_tokens=many"], "many"),
        (["data.eval_fraction=2"], r"data\.eval_fraction=2.*below 1"),
        (["data.long_from=100"], "belong together"),
        (["data.shares={a: 0.5}"], "sum to 0.5"),
        (["data.budget=all", "data.sequences=5"], "budget=all takes every document once"),
        (["data.mix=[{source: a, share: 1.0}, {source: '*', share: 0.0}]"], "must not overlap"),
        (["data.sources.a=/x"], "one of both"),
        (["data.tokenizer=null"], r"Give data\.tokenizer=DIR"),
        (["train.step=3"], r"train\.step"),
        (["data.recall.share=0.1", "data.mix=[{source: a, share: 1.0, whole_windows: true}]"], "not whole_windows"),
    ],
)
def test_words_that_make_no_sense_are_refused_before_anything_is_read(tmp_path, words, error):
    with pytest.raises(ConfigError, match=error):
        prepare_stage(job_of([*EXAMPLE, f"data.out={tmp_path / 'out'}", *words]), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_not_the_models_is_refused_before_work(tmp_path):
    own = corpus.make_tokenizer(tmp_path / "model", corpus.texts(9))
    words = [*EXAMPLE, f"data.out={tmp_path / 'out'}", f"init_from={own}"]
    with pytest.raises(DataError, match=r"tokenizer tokenizer, which is not the model's own \(1,024 tokens instead"):
        job_of(words)
    job_of([*words, "data.allow_tokenizer=tokenizer"])
    assert job_of([w for w in words if not w.startswith("data.tokenizer")]).tokenizer == own
    with pytest.raises(ConfigError, match=r"1,024 tokens and the model of this stage 512 rows"):
        job_of([*EXAMPLE, f"data.out={tmp_path / 'out'}", "model.vocab_size=512"])


def test_what_is_there_already_is_left_and_what_is_tokenized_is_used(tmp_path):
    words = [*EXAMPLE, f"data.out={tmp_path / '65k'}"]
    prepare_stage(job_of(words), progress=False)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "tokenized").rglob("*")}
    with pytest.raises(DataError, match="exists already"):
        prepare_stage(job_of(words), progress=False)
    other = [w.replace("65k", "262k") for w in words]
    assert prepare_stage(job_of(other), progress=False).seq_length == 1024
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "tokenized").rglob("*")} == times


def test_check_finds_what_was_damaged(tmp_path):
    words = [*EXAMPLE, f"data.out={tmp_path / 'out'}"]
    manifest = prepare_stage(job_of(words), progress=False)
    assert len(list(check_folder(tmp_path / "out", REPO / "examples" / "tokenizer"))) > 8
    path = tmp_path / "out" / manifest.train[0].tokens.name
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="checksum is not the one in the manifest"):
        list(check_folder(tmp_path / "out"))
    raw[-3] ^= 1
    path.write_bytes(raw)
    said = json.loads((tmp_path / "out" / "manifest.json").read_text())
    said["made"]["tokens"]["RedPajamaGithub"] += 10_000
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(said))
    with pytest.raises(DataError, match="they do not fit"):
        list(check_folder(tmp_path / "out"))
    with pytest.raises(DataError, match="was made with tokenizer tokenizer"):
        list(check_folder(tmp_path / "out", corpus.make_tokenizer(tmp_path / "other", corpus.texts(9))))


def test_a_folder_of_plain_text_has_no_recipe_in_its_manifest(tmp_path):
    source = corpus.write_lines(tmp_path / "a.jsonl", corpus.records(corpus.texts(60)))
    tokenizer = corpus.make_tokenizer(tmp_path / "tokenizer", corpus.texts(9))
    prepare(source, tmp_path / "out", tokenizer, 64, eval_fraction=0.2, progress=False)
    raw = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(raw) == ["seq_length", "tokenizer", "source", "train", "eval", "format", "version"]
    assert read_manifest(tmp_path / "out").dtype == "<i4"
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError):
        read_manifest(tmp_path / "out")
