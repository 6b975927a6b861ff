"""Which variants of a claim does `make test` run, and which wait for `make test-all`?"""

from collections.abc import Iterable
from typing import Any

import pytest


def long_but(cases: Iterable[Any], *short: Any) -> list[Any]:
    """All cases for `parametrize`, marked `long` but for those that tell the most."""
    cases = list(cases)
    assert set(short) <= set(cases), set(short) - set(cases)
    return [case if case in short else pytest.param(case, marks=pytest.mark.long) for case in cases]
