"""The list of faults that tools/mutants.py plants is true to the code; whether each is caught, the tool tells."""

import re
from pathlib import Path

import pytest

from tools.mutants import Mutant, read_mutants

REPO = Path(__file__).parents[1]
MUTANTS = read_mutants()


def test_there_are_enough_and_each_has_a_name_of_its_own() -> None:
    assert len(MUTANTS) >= 25
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_each_fault_can_be_planted_and_its_test_is_there(mutant: Mutant) -> None:
    text = (REPO / mutant.file).read_text(encoding="utf-8")
    assert mutant.planted_in(text) != text
    file, _, name = mutant.test.partition("::")
    tests = (REPO / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {re.escape(name.partition('[')[0])}\(", tests, re.MULTILINE), mutant.test


def test_a_list_that_is_out_of_date_is_noticed() -> None:
    mutant = Mutant("example", "a.py", "x = 1", "x = 2", "tests/test_a.py")
    assert mutant.planted_in("x = 1\n") == "x = 2\n"
    for text in ("y = 1\n", "x = 1\nx = 1\n"):
        with pytest.raises(ValueError, match="not once"):
            mutant.planted_in(text)
