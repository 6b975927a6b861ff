"""The layouts that can train a model at a window, a batch and a number of ranks.

The rules are those of the trainer's parts: megatron's tensor parallelism (heads and widths divide), the zigzag cut of
a sequence (2 chunks per context rank), sequence parallelism (a local sequence divides by tp when tp > 1), equal
pipeline stages, a whole number of sequences per replica, and the head exchange of the a2a algorithms (a rank cannot
hold less than one key-value head).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megalong.config.schema import ModelConfig
from megalong.runtime.errors import LayoutError
from megalong.topology.layout import Layout, factorisations

CP_COMM_TYPES = ("p2p", "a2a", "a2a+p2p", "all_gather")


@dataclass(frozen=True)
class Demand:
    """What a layout has to serve."""

    model: ModelConfig
    seq_length: int
    """Window, tokens."""
    global_batch_size: int
    """Sequences per optimizer step."""
    cp_comm_type: str = "p2p"
    """How keys and values move: p2p, a2a, a2a+p2p, all_gather."""
    hierarchical_sizes: Sequence[int] | None = None
    """For a2a+p2p: [ranks exchanging heads, ranks in the ring]."""


def layout_problems(layout: Layout, demand: Demand, world_size: int | None = None) -> list[str]:
    """Every rule the layout breaks, one sentence each with the values that met; empty when it is valid.

    Args:
        world_size: ranks that are there; None: the layout's own product.
    """
    model = demand.model
    tp, cp, pp, dp = layout.tp, layout.cp, layout.pp, layout.dp
    problems = []
    if world_size is not None and layout.world_size != world_size:
        problems.append(f"tp*cp*pp*dp = {tp}*{cp}*{pp}*{dp} = {layout.world_size}, but there are {world_size} ranks")
    if model.num_attention_heads % tp or model.num_key_value_heads % tp:
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        problems.append(f"tp={tp} does not divide {heads} attention heads and {kv_heads} key-value heads")
    if model.intermediate_size % tp:
        problems.append(f"tp={tp} does not divide the MLP width of {model.intermediate_size}")
    divisor = 2 * cp * tp
    if demand.seq_length % divisor:
        rule = "2*cp*tp" if tp > 1 else "2*cp"
        problems.append(f"the window of {demand.seq_length} tokens is not divisible by {rule} = {divisor}")
    if model.num_hidden_layers % pp:
        problems.append(f"pp={pp} does not divide {model.num_hidden_layers} layers")
    if demand.global_batch_size % dp:
        problems.append(f"dp={dp} does not divide the global batch of {demand.global_batch_size} sequences")
    return problems + _exchange_problems(layout, demand)


def _exchange_problems(layout: Layout, demand: Demand) -> list[str]:
    """Rules of the algorithm that moves keys and values; only heads inside a tensor-parallel rank can be exchanged."""
    comm, cp, tp = demand.cp_comm_type, layout.cp, layout.tp
    if comm not in CP_COMM_TYPES:
        return [f"attention.cp_comm_type={comm!r} is none of {', '.join(CP_COMM_TYPES)}"]
    if cp == 1 or demand.model.num_key_value_heads % tp:
        return []
    kv_heads = demand.model.num_key_value_heads // tp
    if comm == "a2a" and kv_heads % cp:
        return [
            f"cp_comm_type=a2a shares {kv_heads} key-value heads per tensor-parallel rank among cp={cp} ranks, "
            "which does not divide; use p2p or a2a+p2p"
        ]
    if comm == "a2a+p2p":
        sizes = list(demand.hierarchical_sizes or [])
        if len(sizes) != 2 or sizes[0] * sizes[1] != cp:
            return [
                f"a2a+p2p over cp={cp} ranks needs attention.hierarchical_context_parallel_sizes=[a,b] "
                f"with a*b = {cp}, and it is {demand.hierarchical_sizes}"
            ]
        if kv_heads % sizes[0]:
            return [f"a2a over {sizes[0]} ranks does not divide {kv_heads} key-value heads per tensor-parallel rank"]
    return []


def valid_layouts(demand: Demand, world_size: int, **fixed: int | None) -> Iterator[Layout]:
    """Every valid layout of exactly `world_size` ranks, ascending in (tp, pp, cp); `fixed` pins axes (None: free)."""
    for tp, pp, cp, dp in factorisations(world_size, 4):
        layout = Layout(tp=tp, cp=cp, pp=pp, dp=dp)
        pinned = all(size is None or getattr(layout, axis) == size for axis, size in fixed.items())
        if pinned and not layout_problems(layout, demand):
            yield layout


def check_layout(
    layout: Layout,
    model: ModelConfig,
    seq_length: int,
    global_batch_size: int,
    world_size: int | None = None,
    *,
    cp_comm_type: str = "p2p",
    hierarchical_sizes: Sequence[int] | None = None,
) -> None:
    """Refuse a layout that cannot run. Arguments as in `Demand` and `layout_problems`.

    Raises:
        LayoutError: naming every broken rule and the nearest layouts of the same ranks that would run.
    """
    _check(layout, Demand(model, seq_length, global_batch_size, cp_comm_type, hierarchical_sizes), world_size)


def _check(layout: Layout, demand: Demand, world_size: int | None) -> None:
    problems = layout_problems(layout, demand, world_size)
    if not problems:
        return
    ranks = world_size or layout.world_size
    near = nearest_layouts(layout, list(valid_layouts(demand, ranks)))
    if near:
        advice = f"Layouts of {ranks} ranks that would run: " + "; or ".join(as_overrides(x) for x in near) + "."
    else:
        advice = (
            f"No layout of {ranks} ranks can run this model at this window with {demand.global_batch_size} sequences "
            "per step" + _other_ranks(layout, demand, ranks)
        )
    raise LayoutError(f"The layout {layout} cannot run: {'; '.join(problems)}.\n{advice}")


def _other_ranks(layout: Layout, demand: Demand, ranks: int) -> str:
    """The nearest numbers of ranks, fewer and more, that have a layout, and their layout nearest to the wish."""
    found = []
    for counts in (range(ranks - 1, 0, -1), range(ranks + 1, 2 * ranks + 1)):
        for count in counts:
            if near := nearest_layouts(layout, list(valid_layouts(demand, count)), 1):
                found.append(f"{count} with {as_overrides(near[0])}")
                break
    if found:
        return f". Ranks that can: {'; or '.join(found)}."
    unit = 2 * layout.cp * layout.tp
    below = max(unit, demand.seq_length // unit * unit)
    return f", and no other number can. This layout takes windows of {below} or {below + unit} tokens."


def nearest_layouts(layout: Layout, candidates: Sequence[Layout], count: int = 3) -> list[Layout]:
    """The candidates whose sizes differ least from the layout's, by the sum of size ratios over the four axes."""

    def distance(other: Layout) -> float:
        ratios = [(getattr(layout, a), getattr(other, a)) for a in ("tp", "cp", "pp", "dp")]
        return sum(max(a, b) / min(a, b) - 1 for a, b in ratios)

    return sorted(candidates, key=distance)[:count]


def as_overrides(layout: Layout) -> str:
    """The layout as command-line overrides."""
    return " ".join(f"topology.{axis}={getattr(layout, axis)}" for axis in ("tp", "cp", "pp", "dp"))


def choose_layout(
    model: ModelConfig,
    seq_length: int,
    global_batch_size: int,
    world_size: int,
    *,
    tp: int | None = None,
    cp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    cp_comm_type: str = "p2p",
    hierarchical_sizes: Sequence[int] | None = None,
) -> Layout:
    """A sound valid layout when nothing is known of the machine.

    No tensor or pipeline parallelism unless it was asked for or nothing else is valid, and as many replicas as the
    batch allows, because shorter rings move fewer bytes. The planner's choice weighs memory and wires as well.

    Args:
        tp, cp, pp, dp: axes already decided; None: free.

    Raises:
        LayoutError: no valid layout of `world_size` ranks agrees with the axes already decided.
    """
    demand = Demand(model, seq_length, global_batch_size, cp_comm_type, hierarchical_sizes)
    fixed = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
    candidates = list(valid_layouts(demand, world_size, **fixed))
    if candidates:
        return min(candidates, key=lambda x: (x.tp * x.pp, x.pp, -x.dp))
    wish = {axis: size or 1 for axis, size in fixed.items()}
    rest, left = divmod(world_size, wish["tp"] * wish["cp"] * wish["pp"] * wish["dp"])
    free = next((axis for axis in ("cp", "dp", "pp", "tp") if fixed[axis] is None), None)
    if free and not left:
        # Complete the wish on a free axis, so that the refusal speaks of the rule that bars it, not of the product.
        wish[free] = rest
    _check(Layout(**wish), demand, world_size)
    # The completed wish is no candidate, yet breaks no rule: impossible, since candidates are all that break none.
    raise AssertionError(f"{wish} is valid and was not enumerated")
