"""Attention over a ring is attention: outputs and gradients do not depend on the ring's size."""

import pytest
import torch
import torch.distributed as dist

from megalong.attention import kernels, ring, zigzag
from megalong.attention.exchange import Ring
from megalong.runtime.ranks import RankPool
from tests.attention.reference import attention, inputs, relative_l2

LENGTH = 128
DOCUMENTS = [None, (0, 1, 2, 40, 64, 65, 110)]


def errors_of_ring(dtype: torch.dtype, batch: int, kernel_name: str) -> list[list[float]]:
    """Relative L2 of this rank's (out, dq, dk, dv), for every document layout."""
    n, r = dist.get_world_size(), dist.get_rank()
    found = []
    for documents in DOCUMENTS:
        full = [x.to(dtype) for x in inputs(LENGTH, batch, 4, 2, 16)]
        q, k, v, dout = (zigzag.shard(x, n, r) for x in full)
        for x in (q, k, v):
            x.requires_grad_()
        place = Ring(dist.group.WORLD)
        kernel = kernels.select(kernel_name, q.device, dtype, 16, 0.25)
        steps = ring.plan(LENGTH, n, r, documents)
        out = ring.RingAttention.apply(q, k, v, place, steps, kernel, torch.promote_types(dtype, torch.float32))
        grads = torch.autograd.grad(out, (q, k, v), dout)
        right = (zigzag.shard(x, n, r) for x in attention(*full, documents))
        found.append([relative_l2(a.detach(), b) for a, b in zip((out, *grads), right, strict=True)])
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "batch", "kernel", "tolerance"),
    [
        (torch.float64, 2, "reference", 1e-14),
        (torch.float64, 1, "cpu_flash", 1e-14),
        (torch.float32, 1, "cpu_flash", 2e-6),
        (torch.float32, 2, "cpu_flash", 2e-6),
        (torch.bfloat16, 1, "cpu_flash", 8e-3),
    ],
)
def test_outputs_and_gradients_are_those_of_one_rank(
    ranks: RankPool, size: int, dtype: torch.dtype, batch: int, kernel: str, tolerance: float
) -> None:
    assert max(torch.tensor(ranks.run(errors_of_ring, size, dtype, batch, kernel)).flatten().tolist()) < tolerance


def test_without_documents_every_step_is_one_tile() -> None:
    for size in (1, 2, 8):
        assert all(len(tiles) == 1 for r in range(size) for tiles in ring.plan(64, size, r, None))
