"""How is the program called that runs? As `python tools/plan.py` from a checkout, as `megalong-plan` once installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHECKOUT = (Path(__file__).resolve().parents[2] / "tools").is_dir()
_FILE = r"(?:tools|megalong)/(plan|convert|prepare_data|verify|evaluate|find_theta|card|doctor|pretrain)\.py"


def as_called(text: str, program: str | None = None, checkout: bool = CHECKOUT) -> str:
    """A help or message with commands of the checkout, as the person who reads it can type them.

    Args:
        text: with commands such as `python tools/plan.py` and `torchrun ... megalong/pretrain.py`.
        program: what was started; default: this process.
        checkout: whether tools/ lies beside the package.
    """
    if checkout and Path(program or sys.argv[0]).suffix == ".py":
        return text
    text = re.sub(rf"(torchrun\b[^\n]*? ){_FILE}", lambda m: f"{m[1]}-m megalong.{_room(m[2])}", text)
    return re.sub(rf"(?:python )?{_FILE}", lambda m: f"megalong-{m[1].replace('_', '-')}", text)


def _room(name: str) -> str:
    return name if name == "pretrain" else f"commands.{name}"
