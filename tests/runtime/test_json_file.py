"""Whatever a JSON file holds, it reads or ends in one named error; what only Python takes for JSON is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.runtime import json_file
from megalong.runtime.errors import DataError
from megalong.runtime.json_file import is_plain_name, parse, read_as, read_json
from tests.hostile import VALUES, as_bytes, read_or_refused

SAID = {
    b'{"a": NaN}': "NaN is no JSON number",
    b'{"a": -Infinity}': "Infinity is no JSON number",
    b'{"a": 1e999}': "1e999 is too large",
    b'{"a": ' + b"9" * 5000 + b"}": "Exceeds the limit",
    b'{"a": 1, "a": 2}': "a appears twice",
    b'{"b": {"a": 1, "a": 1}}': "a appears twice",
    b'{"a": ' * 100_000: "nested more than 50 levels",
    b'{"a": ' * 60 + b"1" + b"}" * 60: "nested more than 50 levels",
    b'{"a": "\xff"}': "not UTF-8 text",
    b"\xff\xfe{\x00}\x00": "not UTF-8 text",
    b"": "not JSON",
    b"{": "not JSON",
    b"[1]": r"holds \[1\] instead of a JSON object",
    b"null": "holds None instead",
}


@pytest.mark.parametrize(("text", "said"), SAID.items(), ids=[said[:20] for said in SAID.values()])
def test_what_is_no_json_object_is_one_message_with_the_files_name(tmp_path, text, said):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DataError, match=rf"a\.json is damaged: .*{said}.* Do this\."):
        read_json(tmp_path / "a.json", DataError, "Do this.")


def test_a_folder_a_missing_and_a_huge_file_are_one_message(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is damaged: it is no file"):
        read_json(tmp_path, DataError)
    with pytest.raises(DataError, match=r"a\.json is missing\. Make it"):
        read_json(tmp_path / "a.json", DataError, "Make it.")
    monkeypatch.setattr(json_file, "LIMIT", 3)
    (tmp_path / "a.json").write_text("{}  ")
    with pytest.raises(DataError, match="it has 4 bytes; at most 3 are read"):
        read_json(tmp_path / "a.json", DataError)


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=30) | VALUES.map(as_bytes))
def test_parsing_gives_a_value_or_a_value_error(text):
    try:
        found = parse(text)
    except ValueError:
        return
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_what_was_measured_may_be_no_number():
    assert math.isnan(parse(b'{"loss": NaN}', allow_nan=True)["loss"])
    assert parse(b"[1e999]", allow_nan=True) == [math.inf]


@dataclass(frozen=True)
class Inner:
    name: str
    on: bool = True


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    perhaps: float | None
    inner: Inner
    several: tuple[Inner, ...]
    numbers: list[float | None]
    anything: dict[str, Any]


GOOD = {"count": 1, "share": 2, "perhaps": None, "inner": {"name": "a", "on": False}, "several": [], "numbers": [1.5]}
GOOD |= {"anything": {"x": [1]}}


def outer(**changes: object) -> Outer:
    return read_as(Outer, {**GOOD, **changes}, "file", DataError, "Mend it.")


def test_a_dataclass_is_read_with_its_types():
    read = outer(several=[{"name": "b", "on": True}], numbers=[None, 1])
    assert read == Outer(1, 2.0, None, Inner("a", False), (Inner("b"),), [None, 1.0], {"x": [1]})
    assert type(read.share) is float


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": True}, "file: count: int was expected, found True. Mend it."),
        ({"count": 1.0}, "file: count: int was expected, found 1.0."),
        ({"share": "1"}, "file: share: float was expected, found '1'."),
        ({"share": 10**400}, "file: share: float was expected, found 1000"),
        ({"share": None}, "file: share: float was expected, found None."),
        ({"inner": {"name": "a", "on": "false"}}, "file: inner: on: bool was expected, found 'false'."),
        ({"inner": {"name": "a"}}, "file: inner: missing keys ['on'], unknown keys []."),
        ({"inner": []}, "file: inner: an object was expected, found []."),
        ({"several": {}}, "file: several: a list was expected, found {}."),
        ({"several": [3]}, "file: several[0]: an object was expected, found 3."),
        ({"numbers": ["1"]}, "file: numbers[0]: float was expected, found '1'."),
        ({"anything": 1}, "file: anything: an object was expected, found 1."),
        ({"more": 1}, "file: missing keys [], unknown keys ['more']."),
    ],
)
def test_a_field_of_another_type_is_named(changes, said):
    with pytest.raises(DataError) as caught:
        outer(**changes)
    assert str(caught.value).startswith(said)


def test_unknown_names_may_be_let_through():
    assert read_as(Inner, {"name": "a", "on": True, "new": 1}, "x", DataError, exact=False) == Inner("a")


@settings(max_examples=100, deadline=None)
@given(raw=VALUES, field=st.sampled_from(list(GOOD)))
def test_any_value_fits_or_is_refused(raw: Any, field: str):
    read_or_refused(lambda: outer(**{field: raw}))


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/b", "../a", "a\0b", "\ud800", 3, None, ["a"]])
def test_what_leads_out_of_a_folder_is_no_file_name(name):
    assert not is_plain_name(name)
    assert is_plain_name("model-00001-of-00002.safetensors")
