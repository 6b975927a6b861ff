"""Which optional packages are here, which one does a part of the work, and how is one that is missing got?

Nothing is imported to find out: what is missing is said before torch is loaded. apex counts where its CUDA extensions
are, which its fused optimizer and norms call; PyPI's `apex` is another package. The fused ones need a GPU.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec

from megalong.runtime.errors import ConfigError

ADAMS = ("auto", "transformer_engine", "apex", "torch")
NORMS = ("auto", "apex", "torch")
ELEMENTWISE = ("auto", "triton", "torch")
_APEX = "build it from https://github.com/NVIDIA/apex with its C++ and CUDA extensions (PyPI's apex is another package)"


@dataclass(frozen=True)
class Package:
    """An optional package."""

    title: str
    modules: tuple[str, ...]
    """All of them are there where it is of use."""
    how: str
    """What installs it."""

    @property
    def is_here(self) -> bool:
        """Whether it can be imported."""
        return all(map(_found, self.modules))


TRANSFORMER_ENGINE = Package(
    "Transformer Engine", ("transformer_engine.pytorch",), "pip install 'megalong[gpu]' on a CUDA machine"
)
DALI = Package("NVIDIA DALI", ("nvidia.dali",), "pip install 'megalong[dali]'")
TRITON = Package("Triton", ("triton",), "it comes with torch's CUDA wheels, or pip install triton")
FA3 = Package(
    "FlashAttention 3",
    ("flash_attn_interface",),
    "build it from https://github.com/Dao-AILab/flash-attention, folder hopper",
)
APEX_ADAM = Package("apex", ("apex.optimizers", "amp_C"), _APEX)
APEX_NORM = Package("apex", ("apex.normalization", "fused_layer_norm_cuda"), _APEX)


def _found(module: str) -> bool:
    """Whether a module would be found; the packages that it lies in are not run either."""
    try:
        spec = find_spec(module.partition(".")[0])
        for name in module.split(".")[1:]:
            if spec is None or spec.submodule_search_locations is None:
                return False
            places = list(spec.submodule_search_locations)
            spec = PathFinder.find_spec(f"{spec.name}.{name}", places)
    except (ImportError, ValueError):  # ValueError: sys.modules holds a None of that name
        return False
    return spec is not None


def require(package: Package, setting: str, instead: str) -> None:
    """Refuse a setting whose package is missing.

    Args:
        setting: as it was given, `data.loader=dali`.
        instead: a setting that needs nothing.

    Raises:
        ConfigError: it is not installed.
    """
    if not package.is_here:
        raise ConfigError(f"{setting} needs {package.title}, which is not installed: {package.how}, or use {instead}.")


def adam(wanted: str, cuda: bool) -> str:
    """Who updates the weights: transformer_engine, apex or torch. Of those that are here the first, as megatron-core
    takes them.

    Args:
        wanted: one of `ADAMS`.
        cuda: whether weights lie on a GPU.
    """
    assert wanted in ADAMS, wanted
    if wanted != "auto":
        return wanted
    if cuda and TRANSFORMER_ENGINE.is_here:
        return "transformer_engine"
    return "apex" if cuda and APEX_ADAM.is_here else "torch"


def norm(wanted: str, cuda: bool) -> str:
    """Who computes RMSNorm where Transformer Engine's layers do not: apex or torch.

    Args:
        wanted: one of `NORMS`.
        cuda: whether activations lie on a GPU.
    """
    assert wanted in NORMS, wanted
    if wanted != "auto":
        return wanted
    return "apex" if cuda and APEX_NORM.is_here else "torch"


def elementwise(wanted: str, cuda: bool, deterministic: bool) -> str:
    """Who computes chains of elementwise operators: triton or torch.

    Args:
        wanted: one of `ELEMENTWISE`.
        cuda: whether activations lie on a GPU.
        deterministic: results are the same in every run; triton's are those of the tiles that it finds fastest.
    """
    assert wanted in ELEMENTWISE, wanted
    if wanted != "auto":
        return wanted
    return "torch" if why_not_triton(cuda, deterministic) else "triton"


def why_not_triton(cuda: bool, deterministic: bool) -> str:
    """In brackets behind what runs in the place of triton; empty where it can run."""
    if not cuda:
        return " (triton needs a GPU)"
    if deterministic:
        return " (train.deterministic)"
    if not TRITON.is_here:
        return " (triton not installed)"
    # it compiles the launcher of each kernel (triton/runtime/build.py)
    return "" if shutil.which("gcc") or shutil.which("clang") else " (triton needs gcc or clang)"


def why_not_apex(package: Package, cuda: bool) -> str:
    """In brackets behind what runs in the place of apex."""
    if not package.is_here:
        return " (apex not installed)"
    return "" if cuda else " (apex needs a GPU)"
