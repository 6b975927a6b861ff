"""What lies in a run_dir may be garbage: sound records are kept, the rest is left out or named, never a traceback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.evaluation.results import read_evaluation
from megalong.recipe.compose import to_yaml
from megalong.recipe.resolve import run_of
from megalong.recipe.saved import saved_config
from megalong.runtime.errors import CheckpointError, DataError, NoProgressError
from megalong.runtime.json_file import shown
from megalong.training.metrics import METRICS, _keep_steps
from megalong.training.progress import FILE, require_progress
from tests.hostile import RAW, VALUES, as_bytes, damaged, mutated, read_or_refused

GARBAGE = [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"null", as_bytes(RAW[4]), as_bytes(RAW[3]), b'{"step": NaN}']


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_an_unreadable_note_of_the_last_start_counts_as_none(tmp_path, capsys, content):
    (tmp_path / FILE).write_bytes(content)
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    require_progress(tmp_path, 5, env)
    captured = capsys.readouterr()
    assert f"{FILE} is damaged" in captured.out + captured.err
    with pytest.raises(NoProgressError):
        require_progress(tmp_path, 5, {**env, "SLURM_RESTART_COUNT": "2"})


@settings(max_examples=50, deadline=None)
@given(note=mutated({"job": "slurm 7", "restarts": 0, "step": 5}))
def test_any_note_of_the_last_start_is_judged_or_left_alone(tmp_path_factory, note):
    folder = Path(tmp_path_factory.getbasetemp())
    (folder / FILE).write_bytes(as_bytes(note))
    read_or_refused(lambda: require_progress(folder, 5, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}))
    assert json.loads((folder / FILE).read_text())["step"] == 5


def line(step: Any, **more: Any) -> bytes:
    return json.dumps({"step": step, "loss": 1.0, **more}).encode()


def kept(folder: Path, lines: list[bytes], last: int) -> list[bytes]:
    (folder / METRICS).write_bytes(b"\n".join(lines))
    _keep_steps(folder / METRICS, last)
    content = (folder / METRICS).read_bytes()
    assert not content or content.endswith(b"\n")
    return content.splitlines()


STRANGE = [
    *GARBAGE[1:],
    *(line(v) for v in ("1", None, 1.0, True, [], {}, -1)),
    b'{"loss": 1.0}',
    b'{"step": 1, "step": 2}',
    b"\x00" * 50,
]


@pytest.mark.parametrize("strange", STRANGE, ids=shown)
def test_garbage_in_the_metrics_costs_no_sound_line(tmp_path, capsys, strange):
    lines = [line(1), line(2), strange, line(3), line(4)]
    assert kept(tmp_path, lines, 3) == [line(1), line(2), line(3)]
    assert "line 3 and 0 more are no records" in "".join(capsys.readouterr())


def test_a_line_cut_by_a_kill_goes_without_a_word_and_a_loss_that_is_no_number_stays(tmp_path, capsys):
    nan = b'{"step": 2, "loss": NaN}'
    assert kept(tmp_path, [line(1), nan, line(3)[:-3]], 3) == [line(1), nan]
    assert not "".join(capsys.readouterr())


def test_a_step_that_was_done_twice_stands_there_once_as_it_was_done_last(tmp_path):
    lines = [line(1), line(2, seconds=1), b"\xff", line(2, seconds=2), line(3)]
    assert kept(tmp_path, lines, 2) == [line(1), line(2, seconds=2)]


@settings(max_examples=100, deadline=None)
@given(garbage=st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=8) | VALUES.map(as_bytes)), max_size=4))
def test_whatever_stands_between_sound_lines_stay(tmp_path_factory, garbage):
    lines = [line(step) for step in range(5)]
    for place, text in sorted(garbage, reverse=True):
        lines.insert(place, text.replace(b"\n", b"").replace(b"\r", b""))
    found = kept(Path(tmp_path_factory.getbasetemp()), lines, 3)
    assert [text for text in found if text in {line(s) for s in range(5)}] == [line(step) for step in range(4)]


EVALUATION = {
    "seq_length": 256,
    "before": {"edges": [0, 128, 256], "loss": [1.5, None], "last_quarter": 1.5},
    "after": {"edges": [0, 128, 256], "loss": [1.0, 1.0], "last_quarter": None},
}


@settings(max_examples=100, deadline=None)
@given(content=mutated(EVALUATION).map(as_bytes) | damaged(as_bytes(EVALUATION)))
def test_any_evaluation_reads_or_is_one_message(tmp_path_factory, content):
    folder = Path(tmp_path_factory.getbasetemp())
    (folder / "evaluation.json").write_bytes(content)
    found, refused = read_or_refused(lambda: read_evaluation(folder))
    if not refused:
        curves = [curve for curve in (found.before, found.after) if curve is not None]
        assert all(type(edge) is int for curve in curves for edge in curve.edges)
        assert all(loss is None or type(loss) is float for curve in curves for loss in curve.loss)


@pytest.mark.parametrize(
    "change",
    [
        {"before": None},
        {"before": [1]},
        {"before": {**EVALUATION["before"], "loss": ["1.5", None]}},  # type: ignore[dict-item]
        {"before": {**EVALUATION["before"], "edges": [0, 1]}},  # type: ignore[dict-item]
        {"seq_length": "256"},
        {"more": RAW[4]},
    ],
    ids=shown,
)
def test_an_evaluation_of_wrong_types_is_refused(tmp_path, change):
    (tmp_path / "evaluation.json").write_bytes(as_bytes({**EVALUATION, **change}))
    with pytest.raises(DataError, match=r"evaluation\.json"):
        read_evaluation(tmp_path)


# config.yaml of a checkpoint -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def yaml_text() -> str:
    return to_yaml(run_of(["+stage=65k", "+scale=mini"], 1).config)


def test_a_configuration_reads_back(tmp_path, yaml_text):
    (tmp_path / "config.yaml").write_text(yaml_text)
    assert to_yaml(saved_config(tmp_path)) == yaml_text


HOSTILE: dict[str, bytes] = {
    "a call": b"!!python/object/apply:os.system ['touch %s']",
    "an object": b"run_dir: !!python/object:megalong.config.schema.Config {}",
    "a name": b"run_dir: !!python/name:os.system",
    "references": b"a: &a [1]\nb: *a",
    "itself": b"a: &a [*a]",
    "deep": b"[" * 100_000,
    "deeper than ours": b"a: " + b"[" * 30 + b"]" * 30,
    "no text": b"\xff\xfe\x00",
    "a control character": b"a: \x07",
    "empty": b"",
    "a word": b"hello",
    "a list": b"- 1",
    "an unknown setting": b"no_such: 1",
    "an unknown setting below": b"train: {no_such: 1}",
    "a wrong type": b"train: {steps: many}",
    "another shape": b"train: [1]",
    "a resolver": b"run_dir: ${oc.create:${oc.env:HOME}}",
    "a reference to itself": b"run_dir: ${run_dir}",
    "no end": b"run_dir: ${",
    "two documents": b"a: 1\n---\na: 2",
    "a tab": b"a:\n\t- 1",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_one_message_and_nothing_is_run(tmp_path, name):
    touched = tmp_path / "touched"
    (tmp_path / "config.yaml").write_bytes(HOSTILE[name].replace(b"%s", os.fsencode(touched)))
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged"):
        saved_config(tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize("value", ["[&a [1], *a]", "&a [*a]", "[" * 30 + "]" * 30], ids=["repeated", "itself", "deep"])
def test_a_part_of_a_configuration_is_neither_repeated_nor_nested_without_end(tmp_path, yaml_text, value):
    (tmp_path / "config.yaml").write_text(yaml_text.replace("rope_scaling: null", f"rope_scaling: {value}"))
    with pytest.raises(CheckpointError, match=r"config\.yaml is damaged: .*(stands for another|nested more than)"):
        saved_config(tmp_path)


def test_a_missing_configuration_is_one_message(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.yaml is missing"):
        saved_config(tmp_path)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_changed_bytes_of_a_configuration_read_or_are_one_message(tmp_path_factory, yaml_text, data):
    folder = Path(tmp_path_factory.getbasetemp())
    (folder / "config.yaml").write_bytes(data.draw(damaged(yaml_text.encode())))
    read_or_refused(lambda: saved_config(folder))
