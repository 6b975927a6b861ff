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
    if config.attention.kernel == "fa3":
        packages.require(packages.FA3, "attention.kernel=fa3", "attention.kernel=auto")
    if config.data.loader == "dali":
        packages.require(packages.DALI, "data.loader=dali", "data.loader=memmap, which reads long slices faster")
    if train.adam == "transformer_engine":
        packages.require(engine, "train.adam=transformer_engine", "train.adam=auto")
    if train.adam == "apex":
        packages.require(packages.APEX_ADAM, "train.adam=apex", "train.adam=auto")
    if train.norm == "apex":
        packages.require(packages.APEX_NORM, "train.norm=apex", "train.norm=auto")
    if train.elementwise == "triton" and train.deterministic:
        raise ConfigError(
            "train.elementwise=triton with train.deterministic=true: Triton sums in tiles of the size that it finds "
            "fastest, which may differ from run to run. Use train.elementwise=auto."
        )
    if train.elementwise == "triton":
        packages.require(packages.TRITON, "train.elementwise=triton", "train.elementwise=auto")
    chosen = {"train.adam": train.adam, "train.norm": train.norm, "train.elementwise": train.elementwise}
    fused = {k: v for k, v in chosen.items() if v not in ("auto", "torch")}
    if fused and not _cuda_is_here():
        given = " ".join(f"{k}={v}" for k, v in fused.items())
        raise ConfigError(f"{given} needs a GPU, and there is none here: use {' '.join(f'{k}=auto' for k in fused)}.")


def _cuda_is_here() -> bool:
    from megalong.runtime.device import on_cuda  # imports torch

    return on_cuda()


def parts(config: Config, capability: tuple[int, int] | None) -> str:
    """One line for the start of a run: who does the work, and in whose place.

    Args:
        capability: compute capability of the GPU; None: there is none.
    """
    cuda = capability is not None
    adam = packages.adam(config.train.adam, cuda)
    optimizer = {"transformer_engine": "Transformer Engine FusedAdam", "apex": "apex FusedAdam"}.get(adam)
    norm, kernel = packages.norm(config.train.norm, cuda), _kernel(config, capability)
    if config.attention.backend == "transformer_engine":
        norms, kernel = "Transformer Engine", "Transformer Engine"
    else:
        norms = (
            "apex FusedRMSNorm" if norm == "apex" else "torch RMSNorm" + packages.why_not_apex(packages.APEX_NORM, cuda)
        )
    optimizer = optimizer or "torch AdamW" + packages.why_not_apex(packages.APEX_ADAM, cuda)
    return (
        f"optimizer: {optimizer}; norm: {norms}; attention kernel: {kernel}; "
        f"elementwise: {_elementwise(config, cuda)}; data: {config.data.loader}"
    )


def _kernel(config: Config, capability: tuple[int, int] | None) -> str:
    from megalong.attention.kernels import fastest, with_measured  # imports torch

    kernel, deterministic = config.attention.kernel, config.train.deterministic
    if capability is None:
        return "cpu_flash" if kernel == "auto" else kernel
    kernel = with_measured(kernel, config.cluster.attention_kernel, deterministic)
    return fastest(capability, config.model.head_dim, deterministic) if kernel == "auto" else kernel


def _elementwise(config: Config, cuda: bool) -> str:
    wanted, deterministic = config.train.elementwise, config.train.deterministic
    if packages.elementwise(wanted, cuda, deterministic) == "triton":
        return "Triton kernels by torch.compile"
    return "torch operators" + ("" if wanted == "torch" else packages.why_not_triton(cuda, deterministic))
