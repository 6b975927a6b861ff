"""How fast is attention here? One rank's share of a ring of 32 beside one kernel call on as many pairs of tokens.

On a GPU with Llama-3-8B's heads and 32,768 local tokens, the share of a 1048k sequence on 32 ranks, for every kernel.
On the CPU one thread with small heads: a ring that wastes work shows there too.
"""

from __future__ import annotations

from typing import Any

import torch

from megalong.config.cluster import card
from megalong.doctor.part import Round
from megalong.doctor.result import NOTE, Check, held
from megalong.runtime import fused

RING = 32
GPU_SHAPE, CPU_SHAPE = (32768, 32, 8, 128), (1024, 8, 2, 64)
"""Local tokens, heads, key-value heads, head dim."""
RATIOS = {"cuda": (0.95, 0.93), "cpu": (0.85, 0.85)}
"""Least share of a single call's speed, forward and backward; on the CPU tiles of 1,024 tokens are small."""
WANTED_TFLOPS = {"H200": (550.0, 450.0)}
"""Forward and backward of the faster kernel, on cards whose kernels have public figures (cuDNN on H100, D 128, causal:
566 and 470, flash-attention PR #1893)."""


def on_rank(on_gpu: bool, repeats: int) -> dict[str, dict[str, Any]]:
    """The ring's figures by kernel and dtype, as a task for one rank."""
    from megalong.attention import kernels
    from megalong.doctor.ring_speed import ring_compute

    fused.choose("auto", False)  # the merge of partial outputs, as a run has it
    if not on_gpu:
        torch.set_num_threads(1)
        cases = [("cpu_flash", torch.float32), ("cpu_flash", torch.bfloat16)]
    else:
        cases = [(kernel, torch.bfloat16) for kernel in kernels.on_this_gpu()]
    device, shape = torch.device("cuda" if on_gpu else "cpu"), GPU_SHAPE if on_gpu else CPU_SHAPE
    return {
        f"{kernel} in {str(dtype).removeprefix('torch.')}": ring_compute(RING, shape, dtype, device, kernel, repeats)
        for kernel, dtype in cases
    }


def run(visit: Round) -> list[Check]:
    """Ratios against their limits, TFLOP/s against what is public of this card."""
    found = visit.ranks.run(on_rank, 1, visit.on_gpu, 3 if visit.on_gpu else 2)[0]
    forward, backward = RATIOS[visit.ranks.device]
    checks = []
    for name, row in found.items():
        told = f"forward {row['forward']:.3f}, backward {row['backward']:.3f} of one call's speed"
        good = row["forward"] >= forward and row["backward"] >= backward
        checks.append(held(f"ring of {RING}, {name}", good, told, f">= {forward}, {backward}"))
        rates = f"forward {row['forward_tflops']:.4g}, backward {row['backward_tflops']:.4g} TFLOP/s"
        checks.append(Check(f"rate, {name}", NOTE, rates))
    names = {card(gpu.name) for gpu in visit.machine.gpus}
    for wanted in (WANTED_TFLOPS[name] for name in names if name in WANTED_TFLOPS):
        best = tuple(max(row[key] for row in found.values()) for key in ("forward_tflops", "backward_tflops"))
        good = best[0] >= wanted[0] and best[1] >= wanted[1]
        told = f"forward {best[0]:.0f}, backward {best[1]:.0f} TFLOP/s"
        checks.append(held("the faster kernel", good, told, f">= {wanted[0]:.0f}, {wanted[1]:.0f}"))
    return checks
