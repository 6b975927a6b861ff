"""Proof that information crosses the whole context-parallel group, and stops at document boundaries.

Attention that stays local, a ring that does not turn, ranks in another order than the data's, boundaries that are
ignored: all train without an error, and only the loss is wrong (axolotl 3608 and PR 3928). So before the first step
a few tokens go through the configured attention, with its kernel, algorithm, groups and boundaries, forward and
backward. In batch element j the first token of rank j is changed: exactly the later positions of its document must
change, on every rank. And a gradient put on the outputs of rank j must reach its queries, and exactly the keys and
values that they may see.

It costs one small forward and backward (two with document boundaries). Ranks are told apart by the number that the
*data* gives them, so an attention group in another order is found.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megalong.attention.core import CoreAttention
from megalong.attention.zigzag import local_positions
from megalong.runtime.errors import CanaryError

CHUNK = 4
"""Tokens in each of the 2*CP chunks."""
SHOWN = 12
"""Lines of an error before the rest is only counted."""

INPUTS = ("queries", "keys", "values")

MESSAGES = {
    "mixed": "ranks {here} hold data by the same context-parallel number as another rank of their group",
    "lost": "tokens of rank {owner} do not reach ranks {here}",
    "future": "tokens of rank {owner} change earlier positions on ranks {here}",
    "leak": "tokens of rank {owner} cross a document boundary to ranks {here}",
    **{f"{x} lost": f"gradients of outputs on rank {{owner}} do not reach the {x} of ranks {{here}}" for x in INPUTS},
    **{f"{x} leak": f"gradients of outputs on rank {{owner}} reach {x} of ranks {{here}} they may not" for x in INPUTS},
}

Finding = tuple[str, int, int]
"""(kind, global rank of the owner, global rank where it was found)."""


def check(core: CoreAttention, cp_rank: int, device: torch.device) -> None:
    """Run the canary on all ranks of the job; every rank must call it.

    Args:
        core: the attention of any one layer of this rank.
        cp_rank: context-parallel rank by which this rank's data is cut (`zigzag.shard`).
        device: where the model is.

    Raises:
        CanaryError: on every rank, naming the ranks (global numbers) between which information is lost or leaks.
    """
    numbers = _numbers(core, cp_rank, device)
    found: set[Finding] = set()
    if sorted(numbers) == list(range(core.algorithm.size)):
        owners = [_global_rank(core, numbers.index(r)) for r in range(core.algorithm.size)]
        for documents in _layouts(core):
            found |= _probe(core, cp_rank, owners, device, documents)
    else:
        found.add(("mixed", -1, dist.get_rank()))
    found = _everywhere(found, device)
    if found:
        raise CanaryError(
            f"Attention ({core.cp_comm_type}, kernel {core.attention.kernel}, document_mask "
            f"{core.attention.document_mask}) does not see exactly what it must:\n  " + "\n  ".join(_lines(found))
        )


def _lines(found: set[Finding]) -> list[str]:
    """One line for each kind and owner, the gravest kinds first."""
    lines = []
    for kind, message in MESSAGES.items():
        for owner in sorted({o for k, o, _ in found if k == kind}):
            here = sorted(h for k, o, h in found if (k, o) == (kind, owner))
            lines.append(message.format(owner=owner, here=", ".join(map(str, here))))
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more"]


def _layouts(core: CoreAttention) -> list[tuple[int, ...] | None]:
    """Document starts to try: none; or one document, to see all ranks reached, and two that meet inside a chunk."""
    if core.attention.document_mask == "none":
        return [None]
    return [(0,), (0, CHUNK * core.algorithm.size + 1)]


def _probe(
    core: CoreAttention, cp_rank: int, owners: list[int], device: torch.device, documents: tuple[int, ...] | None
) -> set[Finding]:
    """What is wrong on this rank; `owners` are global ranks by cp rank."""
    size = core.algorithm.size
    length = 2 * CHUNK * size
    everyone = [local_positions(length, size, r) for r in range(size)]
    here = everyone[cp_rank]

    dtype = torch.bfloat16 if core.config.bf16 else core.config.params_dtype
    head_dim = core.config.kv_channels
    generator = torch.Generator().manual_seed(cp_rank)
    q, k, v = (
        torch.randn(len(here), 1, n, head_dim, generator=generator).repeat(1, 1 + size, 1, 1)
        for n in (core.heads, core.kv_heads, core.kv_heads)
    )
    for x, strength in ((q, 1), (k, 1), (v, 8)):
        x[0, 1 + cp_rank] = strength * torch.randn(x.shape[2:], generator=generator)
    dout = torch.zeros(*q.shape[:2], core.heads * head_dim)
    dout[:, 1 + cp_rank] = torch.randn(dout[:, 0].shape, generator=generator)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    starts = None if documents is None else torch.tensor(documents, dtype=torch.int64)
    with torch.enable_grad():
        out = core(q, k, v, starts)
        grads = torch.autograd.grad(out, (q, k, v), dout.to(device, dtype))
    # a change is some 8/sqrt(m) of a row that sees m keys; less is rounding, which batch elements do not share
    difference = (out - out[:, :1]).detach().abs().amax(-1)
    changed = (difference > _noise(dtype) * out.detach().abs().amax(-1)).cpu()
    reached = [grad.ne(0).flatten(2).any(-1).cpu() for grad in grads]

    problems: set[Finding] = set()
    for j in range(size):
        token = everyone[j][0]
        sees = _sees(here[:, None], token[None, None], documents)[:, 0]
        moved = changed[:, 1 + j]
        wrong = {
            "lost": sees & ~moved,
            "future": ~sees & moved & (here < token),
            "leak": ~sees & moved & (here > token),
        }
        for name, got, (must, may) in zip(INPUTS, reached, _reach(everyone[j], here, documents), strict=True):
            wrong |= {f"{name} lost": must & ~got[:, 1 + j], f"{name} leak": ~may & got[:, 1 + j]}
        problems |= {(kind, owners[j], owners[cp_rank]) for kind, where in wrong.items() if where.any()}
    return problems


def _noise(dtype: torch.dtype) -> float:
    """Relative difference that rounding may cause in an output."""
    return max(4 * torch.finfo(dtype).eps, 1e-4)


def _sees(query: torch.Tensor, key: torch.Tensor, documents: tuple[int, ...] | None) -> torch.Tensor:
    """Whether a query position may attend to a key position."""
    starts = torch.tensor(documents or (0,))
    return (query >= key) & (torch.bucketize(query, starts, right=True) == torch.bucketize(key, starts, right=True))


def _reach(
    owner: torch.Tensor, here: torch.Tensor, documents: tuple[int, ...] | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Which of the positions `here` a gradient on the outputs at `owner` must reach, and which it may: as queries, as
    keys, as values. The softmax of a query that sees one key only is 1 whatever its score: nothing must reach the two.
    """
    seen = _sees(owner[:, None], here[None], documents)
    sees_several = _sees(owner, owner - 1, documents)
    own = owner[:, None] == here[None]
    return [
        ((own & sees_several[:, None]).any(0), own.any(0)),
        ((seen & sees_several[:, None]).any(0), seen.any(0)),
        (seen.any(0), seen.any(0)),
    ]


def _numbers(core: CoreAttention, cp_rank: int, device: torch.device) -> list[int]:
    """The `cp_rank` of every member of the attention's group, in the group's order."""
    if core.algorithm.size == 1:
        return [cp_rank]
    mine = torch.tensor([cp_rank], device=device)
    ranks = [torch.empty_like(mine) for _ in range(core.algorithm.size)]
    dist.all_gather(ranks, mine, group=core.algorithm.group)
    return [int(r) for r in ranks]


def _global_rank(core: CoreAttention, member: int) -> int:
    if core.algorithm.size == 1 or core.algorithm.group is None:
        return dist.get_rank() if dist.is_initialized() else 0
    return dist.get_global_rank(core.algorithm.group, member)


def _everywhere(found: set[Finding], device: torch.device) -> set[Finding]:
    """What any rank of the job found; costs one number when all is well."""
    if not dist.is_initialized():
        return found
    failed = torch.tensor([len(found)], device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed.item():
        return set()
    lists: list[set[Finding]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, found)
    return set().union(*lists)
