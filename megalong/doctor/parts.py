"""Which parts has a visit, in which order, and how does one fail alone?"""

from __future__ import annotations

import time
import traceback

from megalong.doctor import attention, canary, cluster, kernels, machine, memory, resume, step, verify, wires
from megalong.doctor.part import Part, Round
from megalong.doctor.result import PartResult
from megalong.runtime.errors import UserError
from megalong.runtime.ranks import RankFailed

PARTS = (
    Part(
        "machine",
        "what is this machine, and what of it stops a run?",
        machine.run,
        ("driver, PCIe slots, links, peer access, ACS, IOMMU, NUMA, GPUDirect RDMA; remedies with their sources",),
    ),
    Part(
        "wires",
        "what do the wires carry, and do sums arrive whole?",
        wires.run,
        ("NCCL instead of gloo: busbw of 256 MiB, and which way its messages take (P2P, SHM, RDMA, sockets)",),
    ),
    Part(
        "kernels",
        "do the attention kernels compute attention?",
        kernels.run,
        ("cuda_flash and cudnn in bf16 on all tiles", "queries of more than 2^31 elements (9 to 30 GiB of memory)"),
    ),
    Part(
        "canary",
        "does information cross the context-parallel group?",
        canary.run,
        ("every algorithm over NCCL, with the GPU's kernels",),
    ),
    Part(
        "verify",
        "does every layout compute what one rank computes?",
        verify.run,
        ("layouts over all GPUs: fp32 against one CPU rank, bf16 against one GPU",),
    ),
    Part(
        "attention",
        "how fast is attention?",
        attention.run,
        ("ring of 32 at 32,768 local tokens of Llama-3-8B's heads, both kernels (H200: 550 and 450 TFLOP/s)",),
    ),
    Part(
        "cluster",
        "what are the facts for the planner?",
        cluster.run,
        ("the shapes of Llama-3-8B; bandwidth inside and beside a pair of GPUs",),
    ),
    Part(
        "step",
        "how long does a step take, and does the plan say so?",
        step.run,
        ("Llama-3-8B's layers, as many as fit, 32,768 tokens a rank: model TFLOP/s",),
    ),
    Part(
        "resume",
        "is a run that stops and resumes the run that never stopped?",
        resume.run,
        ("the same with NCCL and the GPU's kernels",),
    ),
    Part(
        "memory",
        "does a step take the memory that the plan says?",
        memory.run,
        ("the allocator's highest point with two of Llama-3-8B's layers at 16,384 tokens",),
    ),
)
NAMES = tuple(part.name for part in PARTS)


def attempt(part: Part, visit: Round) -> PartResult:
    """Run a part; whatever it ends with is its own result."""
    result, begun = PartResult(part.name, part.question), time.monotonic()
    try:
        result.checks = part.run(visit)
    except (UserError, RankFailed) as error:
        result.error = _told(str(error))
    except Exception:
        result.error = _told(traceback.format_exc())
    result.seconds = time.monotonic() - begun
    return result


def _told(text: str) -> str:
    """The end of what went wrong: a traceback says it last."""
    found = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(found if len(found) <= 4 else [found[0], "...", *found[-2:]])
