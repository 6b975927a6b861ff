"""One voice, and one line for what libraries complain about on import."""

import logging
import warnings

import pytest

from megalong.runtime import console


def test_notices_of_an_import_become_one_line(capsys: pytest.CaptureFixture) -> None:
    with console.gathered_notices("libraries"):
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        logging.getLogger("megatron").warning("something odd happened here and there today")
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith("libraries: 1 notice (something odd happened")


def test_nothing_is_said_when_there_is_nothing(capsys: pytest.CaptureFixture) -> None:
    with console.gathered_notices("libraries"):
        pass
    assert capsys.readouterr().out == ""


def test_only_the_first_rank_speaks(capsys: pytest.CaptureFixture) -> None:
    console.speak_only_from(False)
    try:
        console.say("x")
        console.warn("y")
    finally:
        console.speak_only_from(True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
