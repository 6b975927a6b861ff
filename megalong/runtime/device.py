"""The device that this process computes on, and megatron-core on the CPU where there is no CUDA.

megatron-core 0.16 calls `torch.cuda` unconditionally. `install()` makes a CPU process answer those calls with the
CPU; it does nothing where CUDA is there. Only factory functions and a few methods are replaced, on the `torch`
module itself: unlike a `TorchFunctionMode`, this costs nothing on the operators of a training step.
Each replacement names the megatron-core place that needs it. Import cost: torch only; megatron-core's own
functions are replaced when `install()` runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megalong.runtime.resident import peak_resident_bytes

CPU = torch.device("cpu")
_installed = False

# Factories that megatron-core calls with device="cuda" or pin_memory=True: optimizer/optimizer.py (found_inf),
# optimizer/clip_grads.py, pipeline_parallel/schedules.py (total_num_tokens), distributed/param_and_grad_buffer.py.
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")

# Tensor.type() of a CPU tensor as megatron's optimizers compare it (optimizer/distrib_optimizer.py, clip_grads.py).
_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


def device() -> torch.device:
    """The device of this process: its own CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU


def on_cuda() -> bool:
    """Whether tensors live on a GPU."""
    return torch.cuda.is_available()


def capability() -> tuple[int, int] | None:
    """Compute capability of this process's GPU, (9, 0) of a Hopper; None on the CPU."""
    return torch.cuda.get_device_capability() if on_cuda() else None


def be_deterministic() -> None:
    """Only operators that give the same bits in every run; before the first use of CUDA.

    torch refuses the others by name. cuBLAS needs a workspace of its own for it (docs.nvidia.com/cuda/cublas, results
    reproducibility); memory that nobody has written is left as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def backend() -> str:
    """torch.distributed backend for the device: nccl or gloo."""
    return "nccl" if on_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has finished what it was given (nothing to wait for on the CPU)."""
    if on_cuda():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Highest memory so far: allocated on the GPU, or the resident size of the process on the CPU."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def cuda_devices() -> tuple[str, int, float]:
    """Name, number and memory in GiB of the GPUs that this process sees; of several kinds, all names and the least
    memory."""
    seen = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return " and ".join(sorted({p.name for p in seen})), len(seen), min(p.total_memory for p in seen) / 2**30


def host_memory_gib() -> float:
    """Memory of this node that its processes may use, GiB: what is there, or what a container is allowed."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            found = min(found, int(Path(limit).read_text(encoding="ascii")))
    return found / 2**30


def set_cuda_device(local_rank: int) -> None:
    """Bind this process to the GPU of its local rank."""
    if on_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def install() -> None:
    """Make `torch.cuda` answer for the CPU. Idempotent; does nothing where CUDA is available."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _replace_factories()
    _replace_tensor_methods()
    _replace_cuda_module()
    _replace_rng()


def _is_cuda(target: Any) -> bool:
    return (isinstance(target, str) and target.startswith("cuda")) or (
        isinstance(target, torch.device) and target.type == "cuda"
    )


def _replace_factories() -> None:
    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return create

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _replace_tensor_methods() -> None:
    torch_type = torch.Tensor.type

    def tensor_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _TYPE_NAMES.get(self.dtype) or torch_type(self)
        return torch_type(self, dtype, *args, **kwargs)

    def identity(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    tensor: Any = torch.Tensor
    tensor.type = tensor_type
    # dist_checkpointing/exchange_utils.py, language_module.py (tied embeddings), optimizer.py: `.cuda()`
    tensor.cuda = identity
    torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]


class _Stream:
    """Stands for a CUDA stream where work is done in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> None: ...
    def synchronize(self) -> None: ...


def _replace_cuda_module() -> None:
    cuda: Any = torch.cuda
    stream = _Stream()

    @contextlib.contextmanager
    def no_context(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    def nothing() -> Callable[..., None]:
        # a new object for every name: torch._dynamo refuses one function under two of its names
        return lambda *args, **kwargs: None

    cuda.current_device = lambda: CPU  # tensor_parallel/mappings.py and everywhere: device=torch.cuda.current_device()
    cuda.set_device = nothing()
    cuda.synchronize = nothing()  # p2p_communication.py, dist_checkpointing/strategies
    cuda.empty_cache = nothing()  # optimizer.py
    cuda.nvtx.range_push = nothing()  # utils.py nvtx_range_push
    cuda.nvtx.range_pop = nothing()
    cuda.Stream = _Stream  # distributed_data_parallel.py
    cuda.stream = no_context  # param_and_grad_buffer.py
    cuda.current_stream = lambda *a, **k: stream
    cuda.default_stream = lambda *a, **k: stream


def _replace_rng() -> None:
    """tensor_parallel/random.py keeps one state per named region; here they are states of the CPU generator."""
    cuda: Any = torch.cuda
    cuda.get_rng_state = lambda *a, **k: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked writers of a save must not meet its threads
    from megatron.core.tensor_parallel import random as megatron_random

    def get_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
