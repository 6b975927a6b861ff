"""What stands on a command line: keys that do not exist are refused however spelled, texts are taken as they are."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.config.schema import Config, EvaluationConfig
from megalong.recipe.compose import from_yaml, to_yaml
from megalong.recipe.overrides import UNWRITABLE, read
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import ConfigError, ThetaError
from tests.slurm.cluster import PATH

REPO = Path(__file__).parents[2]
MINI = ("+stage=65k", "+scale=mini")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("+train.lrr=1e-3", r"^There is no setting 'train\.lrr'\. Did you mean train\.lr"),
        ("++train.learning_rate=1", r"no setting 'train\.learning_rate'\. Did you mean train\.lr\?"),
        ("train.lrr=1e-3", r"Did you mean train\.lr"),
        ("+foo=1", "no setting 'foo'"),
        ("lr=1", r"Did you mean scale\.lr, stage\.lr, train\.lr"),
        ("+train={lrr: 1}", r"no setting 'train\.lrr'"),
        ("+model.rope_scalling.x=1", r"Did you mean model\.rope_scaling"),
        ("~train.lr", "cannot be taken out"),
        ("~cluster", "cannot be taken out"),
        ("hydra.job.name=x", r"changes nothing here; .*hydra\.run\.dir, hydra\.searchpath"),
        ("train@foo=stage", "no setting"),
        ("--train.lr", "sets nothing: write key=value"),
        ("--info", "--info cannot be used here"),
        ("train.lr=1=2", "train.lr=1=2: the value cannot be read"),
        ("train.steps=1.5", r"train\.steps=1\.5"),
        ("train.steps=true", r"train\.steps=true"),
        ("train.lr=true", r"train\.lr=true"),
        ("cluster.nodes=many", r"cluster\.nodes\.value"),
        ("train=null", "no train/null"),
        ("run_dir=", "run_dir= is empty"),
        ("run_dir=\udcff", "UTF-8"),
        ("run_dir=a\nb", "without line breaks"),
        ("checkpoint.allow_changed=[train.lrr]", r"no setting 'train\.lrr'"),
        ("train.lr=${train.lr}", "Recursive"),
        ("model.rope_scaling=3", "rope_scaling=3: give"),
        ("model.num_key_value_heads=3", "does not divide"),
    ],
)
def test_what_sets_nothing_is_refused(word: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_of([*MINI, word], 1)


def test_all_unknown_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'trian\.lr'.*'seeed'"):
        run_of([*MINI, "trian.lr=1", "+seeed=3"], 1)


def test_a_key_may_be_spelled_with_a_plus_and_given_twice_and_the_last_counts() -> None:
    config = run_of([*MINI, "+train.lr=0.1", "train.lr=0.2", "++train.lr=0.3", "stage=262k"], 1).config
    assert (config.train.lr, config.stage.name) == (0.3, "262k")


def test_the_fields_of_a_rope_dictionary_are_checked_before_anything_runs() -> None:
    fields = ["model.rope_scaling.rope_type=linear", "+model.rope_scaling.factor=2.0"]
    assert run_of([*MINI, *fields], 1).config.model.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ThetaError, match="has no field facktor"):
        run_of([*MINI, *fields, "+model.rope_scaling.facktor=2.0"], 1)


def test_an_unknown_key_in_a_file_of_settings_is_refused() -> None:
    text = to_yaml(run_of(MINI, 1).config)
    with pytest.raises(ConfigError, match=r"no setting 'train\.lrr'. Did you mean train\.lr"):
        from_yaml(text.replace("train:\n", "train:\n  lrr: 3\n"))


@pytest.mark.parametrize("text", ["", "- 1\n- 2", "train: {", "train: 3", "just words", "\tx: [", "a: ${"])
def test_what_is_no_config_yaml_is_a_named_error(text: str) -> None:
    with pytest.raises(ConfigError):
        from_yaml(text)


def test_a_config_yaml_from_before_a_setting_existed_has_its_default() -> None:
    config = run_of([*MINI, "train.max_skipped=9", "data.allow_tokenizer=t", "evaluation.samples=2"], 1).config
    lines = [x for x in to_yaml(config).splitlines() if "max_skipped" not in x and "allow_tokenizer" not in x]
    group = lines.index("evaluation:")
    del lines[group : group + 1 + next(i for i, x in enumerate(lines[group + 1 :]) if not x.startswith("  "))]
    old = from_yaml("\n".join(lines))
    assert (old.train.max_skipped, old.data.allow_tokenizer, old.evaluation) == (5, None, EvaluationConfig())
    assert old.train.lr == config.train.lr


KEYS = ("run_dir", "init_from", "data.path", "data.allow_tokenizer", "cluster.gpu")
ODD = [
    "a=b",
    "ü",
    "it's",
    "a[0]",
    "a(b",
    "a b",
    "a,b",
    "{a}",
    "$HOME",
    "a\\",
    "~a",
    "a:b",
    "#a",
    "true",
    "1e3",
    "${a",
    "-",
]
ODD += ["${a", "${b}", "\\${run_dir", "'a", "a\"b'c"]


def texts_of(config: Config) -> list[str | None]:
    return [config.run_dir, config.init_from, config.data.path, config.data.allow_tokenizer, config.cluster.gpu]


@pytest.mark.parametrize("first", range(0, len(ODD), len(KEYS)))
def test_a_text_is_taken_as_it_stands_and_written_down_so(first: int) -> None:
    values = (ODD + ODD)[first : first + len(KEYS)]
    config = run_of([*MINI, *(f"{key}={text}" for key, text in zip(KEYS, values, strict=True))], 1).config
    assert texts_of(config) == values
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_holds_text_takes_every_text(key: str) -> None:
    assert [read([f"{key}={text}"]).texts[key] for text in ODD] == ODD


CONFIG = run_of(MINI, 1).config
TEXT = st.text(
    st.one_of(st.sampled_from("${}\\'\":#?!&*%@`,[] "), st.characters(codec="utf-8", exclude_categories=UNWRITABLE)),
    min_size=1,
).filter(lambda text: text != "???")  # OmegaConf's word for a value that is missing


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXT, min_size=len(KEYS), max_size=len(KEYS)))
def test_any_text_reads_back_from_config_yaml(values: list[str]) -> None:
    config = copy.deepcopy(CONFIG)
    config.run_dir, config.init_from, config.data.path, config.data.allow_tokenizer, config.cluster.gpu = values
    assert from_yaml(to_yaml(config)) == config


def test_quotes_as_hydra_wants_them_and_other_settings_still_work_in_a_text() -> None:
    words = ["run_dir='runs/${stage.name}/a=b'", "init_from=null", 'data.path="x y"']
    config = run_of([*MINI, *words], 1).config
    assert (config.run_dir, config.init_from, config.data.path) == ("runs/65k/a=b", None, "x y")
    with pytest.raises(ConfigError, match=r"train\.lr has no value of its own"):
        run_of([*MINI, "run_dir=${train.lr}"], 1)


@pytest.mark.parametrize(
    "command", [("tools/plan.py",), ("tools/verify.py",), ("slurm/stage.sbatch", "--dry-run", "run_dir=a")]
)
def test_the_other_command_lines_refuse_an_unknown_key_too(command: tuple[str, ...]) -> None:
    first = [] if command[0].startswith("slurm") else [sys.executable]
    words = [*first, *command, *MINI, "+train.lrr=3"]
    done = subprocess.run(words, cwd=REPO, env=os.environ | {"PATH": PATH}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no setting 'train.lrr'" in done.stderr
    assert "Traceback" not in done.stderr
