"""Killed before any system call that changes names or files, a conversion leaves the old folder or the new one."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.checksums import Checksums
from megalong.convert.hf_folder import is_hf
from megalong.convert.output_folder import OutputFolder
from megalong.runtime import aside

CALLS = ("mkdir", "open", "rename", "replace", "unlink", "rmdir", "fsync", "ftruncate", "link", "symlink")


def convert(target: Path, text: str) -> None:
    with OutputFolder(target, 0, overwrite=True, is_kind=is_hf) as folder:
        folder.small_file("config.json", json.dumps(text).encode())
        folder.small_file("sub/model.safetensors", text.encode() * 1000)


def content(target: Path) -> str | None:
    """What conversion wrote the folder, all of whose files are right; None where there is no folder."""
    if not target.exists():
        return None
    assert Checksums(target).check_all() == 2
    assert sorted(p.name for p in target.iterdir()) == ["checksums.json", "config.json", "sub"]
    return str(json.loads((target / "config.json").read_text()))


def killed_before(target: Path, call: int) -> bool:
    """Convert in a child that is killed before its `call`-th system call; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            _die_before(call)
            convert(target, "new")
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _die_before(call: int) -> None:
    seen = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    aside.exchange = counted(aside.exchange)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_before_any_call_leaves_the_old_or_the_new_and_can_be_run_again(tmp_path: Path, replaces: bool) -> None:
    before, found = "old" if replaces else None, []
    for call in range(1, 1000):
        target = tmp_path / str(call) / "out"
        target.parent.mkdir()
        if replaces:
            convert(target, "old")
        killed = killed_before(target, call)
        found.append(content(target))
        assert found[-1] in (before, "new"), call
        convert(target, "again")
        assert content(target) == "again"
        assert list(target.parent.iterdir()) == [target]
        shutil.rmtree(target.parent)
        if not killed:
            break
    assert found[-1] == "new"
    assert found.index("new") > 10
    assert found == sorted(found, key=lambda text: text == "new")  # never back
    assert found.count("new") > 3  # kills after the name was given, too
