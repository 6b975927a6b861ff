"""Builds what `pip install` would install, and runs its programs where nothing else of the project is to be found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Output of a program that succeeds and finds megalong in `path` and nowhere else."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MEGALONG_", "PYTHONPATH"))}
    env = clean | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """Two wheels: of the checkout's files, and of the source distribution that these make."""
    source, out = folder / "source", folder / "sdist"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, source)
    for name in ("conf", "slurm", "megalong"):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-c", BUILD, "build_wheel", folder / "direct", cwd=source)
    run(sys.executable, "-c", BUILD, "build_sdist", out, cwd=source)
    shutil.unpack_archive(next(out.glob("*.tar.gz")), out, filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=next(p for p in out.iterdir() if p.is_dir()))
    return next((folder / "direct").glob("*.whl")), next(folder.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """The package and its programs, without what it needs."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    run(*pip, "--target", folder, wheel, cwd=wheel.parent)
    return folder
