"""Who does which part of the work here: optimizer, norms, attention, data? Are the chosen packages installed?"""

from __future__ import annotations

from megalong.config.schema import Config
from megalong.runtime import packages
from megalong.runtime.errors import ConfigError


def check_packages(config: Config) -> None:
    """Every package that a setting asks for is installed, and has the device that it needs.

    Raises:
        ConfigError: naming the setting, what installs the package, and what runs without it.
    """
    train, engine = config.train, packages.TRANSFORMER_ENGINE
    if config.attention.backend == "transformer_engine":
        packages.require(engine, "attention.backend=transformer_engine", "attention.backend=megalong")
    if config.data.loader == "dali":
        packages.require(packages.DALI, "data.loader=dali", "data.loader=memmap, which reads long slices faster")
    if train.adam == "transformer_engine":
        packages.require(engine, "train.adam=transformer_engine", "train.adam=auto")
    if train.adam == "apex":
        packages.require(packages.APEX_ADAM, "train.adam=apex", "train.adam=auto")
    if train.norm == "apex":
        packages.require(packages.APEX_NORM, "train.norm=apex", "train.norm=auto")
    fused = {k: v for k, v in (("train.adam", train.adam), ("train.norm", train.norm)) if v not in ("auto", "torch")}
    if fused and not _cuda_is_here():
        given = " ".join(f"{k}={v}" for k, v in fused.items())
        raise ConfigError(f"{given} needs a GPU, and there is none here: use {' '.join(f'{k}=auto' for k in fused)}.")


def _cuda_is_here() -> bool:
    from megalong.runtime.device import on_cuda  # imports torch

    return on_cuda()


def parts(config: Config, cuda: bool) -> str:
    """One line for the start of a run: who does the work, and in whose place."""
    adam = packages.adam(config.train.adam, cuda)
    optimizer = {"transformer_engine": "Transformer Engine FusedAdam", "apex": "apex FusedAdam"}.get(adam)
    norm, kernel = packages.norm(config.train.norm, cuda), config.attention.kernel
    if kernel == "auto":
        kernel = "cuda_flash" if cuda else "cpu_flash"
    if config.attention.backend == "transformer_engine":
        norms, kernel = "Transformer Engine", "Transformer Engine"
    else:
        norms = (
            "apex FusedRMSNorm" if norm == "apex" else "torch RMSNorm" + packages.why_not_apex(packages.APEX_NORM, cuda)
        )
    optimizer = optimizer or "torch AdamW" + packages.why_not_apex(packages.APEX_ADAM, cuda)
    return f"optimizer: {optimizer}; norm: {norms}; attention kernel: {kernel}; data: {config.data.loader}"
