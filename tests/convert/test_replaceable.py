"""`--overwrite` replaces what a conversion wrote, whole and alone, and nothing else that has the name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.convert import replaceable
from megalong.convert.hf_folder import is_hf
from megalong.convert.output_folder import OutputFolder
from megalong.convert.to_hf import meta_to_hf
from megalong.runtime import aside
from megalong.runtime.errors import CheckpointError
from tests.convert.test_from_meta import meta_tensors, write


def convert(
    target: Path, text: str = "new", meanwhile: Callable[[], object] = lambda: None, overwrite: bool = True
) -> None:
    """What every conversion does with its target, with small files."""
    with OutputFolder(target, 0, overwrite, is_hf) as folder:
        folder.small_file("config.json", text.encode())
        folder.small_file("model.safetensors", b"weights")
        folder.small_file("more/tokenizer.json", b"tokens")
        meanwhile()


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    convert(folder, "old", overwrite=False)
    return folder


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_what_a_conversion_wrote_is_replaced(ours: Path) -> None:
    convert(ours)
    assert (ours / "config.json").read_text() == "new"
    assert sorted(tree(ours)) == ["checksums.json", "config.json", "model.safetensors", "more", "more/tokenizer.json"]
    assert list(ours.parent.iterdir()) == [ours]


def test_an_empty_folder_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def edit_list(folder: Path, **entries: object) -> None:
    path = folder / "checksums.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "checksums.json").unlink(), "it has no checksums.json"),
        (lambda f: (f / "checksums.json").write_text("{}"), "it lists no file"),
        (lambda f: (f / "checksums.json").write_text("[" * 100_000), r"checksums\.json is damaged: it is nested more"),
        (
            lambda f: edit_list(f, **{"/etc/passwd": {"bytes": 1, "sha256": ""}}),
            r"entry of '/etc/passwd' makes no sense",
        ),
        (lambda f: (f / "README.md").write_text("mine"), "README.md is not in its checksums.json"),
        (lambda f: (f / ".git").mkdir(), ".git is not in its checksums.json"),
        (lambda f: (f / "more" / ".hidden").write_text("mine"), r"more/\.hidden is not in its"),
        (lambda f: (f / "empty").mkdir(), "empty is not in its checksums.json"),
        (lambda f: (f / "more" / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda f: (f / "config.json").write_text("edited by hand"), r"config\.json has 14 bytes instead of 3"),
        (lambda f: (f / "config.json").write_text("OLD"), r"config\.json was changed"),
        (lambda f: (f / "config.yaml").write_text("stage: 1"), "a checkpoint of a training run"),
        (lambda f: [(f / name).unlink() for name in ("config.json", "model.safetensors")], "it is of another kind"),
        (
            lambda f: [(f / "model.safetensors").rename(f.parent / "w"), (f / "model.safetensors").symlink_to("../w")],
            "model.safetensors is not in its checksums.json",
        ),
    ],
)
def test_anything_else_is_left_alone_and_the_reason_is_said(
    ours: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(ours)
    before = tree(ours)
    with pytest.raises(CheckpointError, match=said) as caught:
        convert(ours)
    assert "--overwrite does not remove it" in str(caught.value)
    assert tree(ours) == before
    assert not ours.with_name("out.partial").exists()


def test_large_weights_are_compared_by_size_alone(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (ours / "model.safetensors").write_bytes(b"WEIGHTS")
    monkeypatch.setattr(replaceable, "SMALL", 6)
    convert(ours)


def test_what_came_while_the_conversion_ran_is_not_lost(ours: Path) -> None:
    with pytest.raises(CheckpointError, match=r"notes\.txt is not in its .* whole and lies in .*out\.partial/new"):
        convert(ours, meanwhile=lambda: (ours / "notes.txt").write_text("mine"))
    assert (ours / "notes.txt").read_text() == "mine"
    assert (ours.with_name("out.partial") / "new" / "checksums.json").is_file()


def test_a_name_that_is_taken_meanwhile_does_not_cost_the_result(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"Nothing is lost: .*out\.partial/new"):
        convert(target, meanwhile=lambda: (target / "mine").mkdir(parents=True), overwrite=False)
    assert (tmp_path / "out.partial" / "new" / "config.json").read_text() == "new"
    assert [p.name for p in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_around_the_source_is_never_a_target(tmp_path: Path, link: bool) -> None:
    """A repository with Meta's files in `original/` and a config.json, even one that this program wrote."""
    convert(tmp_path / "repo")
    write(tmp_path / "repo" / "original", meta_tensors(), 1)
    before = tree(tmp_path)
    repo = tmp_path / "link" / "repo" if link else tmp_path / "repo"
    if link:
        (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="contains the source"):
        meta_to_hf(repo / "original", tmp_path / "repo", overwrite=True)
    with pytest.raises(CheckpointError, match="is the source"):
        meta_to_hf(tmp_path / "repo" / "original", repo / "original", overwrite=True)
    with pytest.raises(CheckpointError, match="lies inside the source"):
        meta_to_hf(repo / "original", tmp_path / "repo" / "original" / "hf")
    (tmp_path / "link").unlink(missing_ok=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda p: p.symlink_to("elsewhere")])
def test_a_partial_of_someone_else_is_left_alone(
    tmp_path: Path, make: Callable[[Path], object], overwrite: bool
) -> None:
    partial = tmp_path / "out.partial"
    make(partial)
    if partial.is_dir():
        (partial / "thesis.tex").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"out\.partial is in the way"):
        convert(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == before


def test_what_an_older_version_kept_while_replacing_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(CheckpointError, match=r"out\.replaced is what out was before"):
        convert(tmp_path / "out")
    assert (tmp_path / "out.replaced").is_dir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".", "is no name for a folder"),
        ("/", "is no name for a folder"),
        ("sub/..", "is no name for a folder"),
        ("file", "is a file"),
        ("file/below/out", "file is a file"),
        ("link", "is a link to sub"),
        ("x" * 5000, "cannot be made"),
        ("y" * 255, "cannot be written"),  # no room for .partial
        ("zero\0byte", "cannot be written"),
    ],
)
def test_what_cannot_be_a_target_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("file").touch()
    Path("link").symlink_to("sub")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        convert(Path(name))
    assert tree(tmp_path) == before


def test_folders_above_the_target_are_made_and_go_again_when_it_fails(tmp_path: Path) -> None:
    convert(tmp_path / "a" / "b" / "out")
    assert (tmp_path / "a" / "b" / "out" / "config.json").is_file()
    with pytest.raises(ZeroDivisionError), OutputFolder(tmp_path / "c" / "d" / "out", 0):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_cannot_exchange_names_is_found_before_the_work(
    ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(a: Path, b: Path) -> None:
        raise OSError(22, os.strerror(22))

    monkeypatch.setattr(aside, "exchange", refuses)
    begun: list[str] = []
    with pytest.raises(CheckpointError, match=r"cannot be replaced in one step here: Invalid argument\. Remove it"):
        convert(ours, meanwhile=lambda: begun.append("work"))
    assert not begun
    assert (ours / "config.json").read_text() == "old"
    assert list(ours.parent.iterdir()) == [ours]
    shutil.rmtree(ours)
    convert(ours)  # nothing to exchange
