"""What the pages name exists: every file of the project, and every function or class named in one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(
    r"`((?:megalong|tools|tests|conf|slurm|benchmarks|docs|\.ci)/[\w./-]+\.(?:py|yaml|sbatch|md|toml))(?:::(\w+))?`"
)


def missing(text: str) -> list[str]:
    """Places named in a page that are not there."""
    found = []
    for file, name in PLACE.findall(text):
        path = ROOT / file
        if not path.is_file() or (name and not re.search(rf"^(?:def|class) {name}\b", path.read_text(), re.M)):
            found.append(f"{file}::{name}" if name else file)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing(page.read_text()) == []


def test_a_name_that_is_gone_is_found() -> None:
    assert missing("`megalong/run.py::Run` `megalong/run.py::Gone` `megalong/gone.py`") == [
        "megalong/run.py::Gone",
        "megalong/gone.py",
    ]
