"""What tests of megatron's groups share."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megalong.runtime import device


@pytest.fixture
def torch_on_cpu() -> Iterator[None]:
    device.install()
    yield
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
