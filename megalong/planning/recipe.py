"""The cost of the whole recipe, stage by stage, beside what the model card reports.

For each stage: the card's own layout (rings of 8 and 32, one replica per ring), the layout and policy of recompute that
the planner would choose on the same devices, its choice with every layer computed again, and one single ring over all
of them. (The card's and the single ring have every layer computed again.) All but the card's minutes is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalong.config.cluster import SHARES_OF_THE_PEAK, ClusterConfig
from megalong.model.flops import hardware_flops_per_step, model_flops_per_step
from megalong.planning.choose import candidates, ranking
from megalong.planning.plan import Plan, make_plan
from megalong.planning.workload import Workload
from megalong.topology.layout import Layout

CLUSTERS = {8: "l40s-1x8", 32: "l40s-4x8", 512: "l40s-64x8"}  # the card's GPUs, by number
CARD_RING = {8: 8, 32: 32, 512: 32}  # ranks of one of the card's rings, by GPUs


@dataclass(frozen=True)
class RecipeRow:
    """One stage."""

    stage: str
    gpus: int
    tokens: int
    card_minutes: float
    card: Plan
    """The card's layout."""
    best: Plan
    """The fastest layout and policy of recompute that fit."""
    full: Plan
    """The fastest layout that fits when every layer is computed again, attention included, the MLP in one piece."""
    single_ring: Plan
    """All devices in one ring."""

    @property
    def card_gpu_hours(self) -> float:
        return self.card_minutes / 60 * self.gpus

    @property
    def card_model_tflops(self) -> float:
        """Model TFLOP/s per GPU that the card's minutes imply (no recompute)."""
        work = self.card.work
        return self._per_gpu(model_flops_per_step(work.model, work.seq_length, work.global_batch_size))

    @property
    def card_hardware_tflops(self) -> float:
        """The same with every layer computed again in backward."""
        work = self.card.work
        return self._per_gpu(hardware_flops_per_step(work.model, work.seq_length, work.global_batch_size, "full"))

    def _per_gpu(self, flops: float) -> float:
        return flops * self.card.work.steps / (self.card_minutes * 60) / self.gpus / 1e12

    @property
    def verdict(self) -> str:
        """Whether the card's minutes are possible on this hardware."""
        peak = self.card.cluster.peak_tflops
        if self.card_model_tflops > peak:
            return f"beyond the hardware: {self.card_model_tflops:.0f} of {peak:.0f} TFLOP/s without any recompute"
        if self.card_hardware_tflops > peak:
            return (
                f"beyond the hardware: with recompute {self.card_hardware_tflops:.0f} of {peak:.0f} TFLOP/s, and "
                f"without it {self.card_model_tflops:.0f} ({self.card_model_tflops / peak:.0%} of the peak)"
            )
        return f"possible: {self.card_model_tflops:.0f} model TFLOP/s ({self.card_model_tflops / peak:.0%} of the peak)"


def recipe_row(name: str, card_minutes: float, work: Workload, cluster: ClusterConfig) -> RecipeRow:
    """Plan one stage three ways.

    Args:
        work: the stage, its recompute `auto` or fixed; its layout's ranks are the devices to use.
        cluster: as many devices, wired as they would be.
    """
    gpus = work.layout.world_size
    ring = CARD_RING.get(gpus, gpus)
    every_layer = replace(work, recompute="full", mlp_chunk=0)
    return RecipeRow(
        stage=name,
        gpus=gpus,
        tokens=work.tokens_per_step * work.steps,
        card_minutes=card_minutes,
        card=make_plan(every_layer.on(Layout(cp=ring, dp=gpus // ring)), cluster),
        best=ranking(list(candidates(work, cluster, gpus)))[0],
        full=ranking(list(candidates(every_layer, cluster, gpus)))[0],
        single_ring=make_plan(every_layer.on(Layout(cp=gpus)), cluster),
    )


def table(rows: Sequence[RecipeRow]) -> str:
    """The recipe as text."""
    lines = [
        "minutes per stage; the card's as reported, all others computed by this planner",
        "stage        tokens  GPUs  card  card's layout  planner's choice (layout, recompute)                    "
        "all again  one ring",
    ]
    for row in rows:
        lines.append(
            f"{row.stage:<6} {row.tokens:>12,} {row.gpus:>5} {row.card_minutes:>5.0f}  {_minutes(row.card):>13}  "
            f"{_minutes(row.best):>7} {f'({row.best.work.layout}, {row.best.work.recompute})':<45} "
            f"{_minutes(row.full):>8} {_minutes(row.single_ring):>9}"
        )
    card, best = sum(r.card_gpu_hours for r in rows), sum(r.best.gpu_hours for r in rows)
    own, full = (sum(plan.gpu_hours for plan in plans) for plans in zip(*((r.card, r.full) for r in rows), strict=True))
    energy = sum(r.best.kwh for r in rows)
    lines += [
        f"GPU hours: card {card:,.0f}; card's layouts computed {own:,.0f}; planner's choice {best:,.0f} "
        f"({full:,.0f} if all of every layer is computed again; {energy:,.0f} kWh at full power)",
        "* does not fit in the memory of the device under megatron's distributed optimizer (weights and fp32 gradients "
        "are whole on every rank)",
    ]
    lines += [f"card's {row.card_minutes:.0f} minutes for {row.stage}: {row.verdict}" for row in rows]
    cluster = rows[0].card.cluster
    facts = cluster.facts()
    stated = ", ".join(f"{name} {facts[name].value} ({facts[name].tag})" for name in SHARES_OF_THE_PEAK)
    lines.append(f"efficiencies: {stated}; peak {cluster.peak_tflops:.0f} ({cluster.peak_bf16_tflops.tag})")
    return "\n".join(lines)


def _minutes(plan: Plan) -> str:
    return f"{plan.wall_s / 60:,.0f}{'' if plan.fits else '*'}"


def as_json(rows: Sequence[RecipeRow]) -> dict[str, Any]:
    """The recipe as plain values; minutes unless the key says otherwise."""

    def of(plan: Plan) -> dict[str, Any]:
        return {
            "layout": asdict(plan.work.layout),
            "recompute": plan.work.recompute,
            "minutes": plan.wall_s / 60,
            "gpu_hours": plan.gpu_hours,
            "fits": plan.fits,
            "memory_gib": plan.memory.total / 2**30,
            "mfu": plan.use.mfu,
            "step_seconds": asdict(plan.step.seconds),
        }

    return {
        "stages": [
            {
                "stage": row.stage,
                "gpus": row.gpus,
                "tokens": row.tokens,
                "card": {
                    "minutes": row.card_minutes,
                    "gpu_hours": row.card_gpu_hours,
                    "model_tflops_per_gpu": row.card_model_tflops,
                    "hardware_tflops_per_gpu_full_recompute": row.card_hardware_tflops,
                    "verdict": row.verdict,
                },
                "card_layout": of(row.card),
                "chosen": of(row.best),
                "full_recompute": of(row.full),
                "single_ring": of(row.single_ring),
            }
            for row in rows
        ],
        "card_gpu_hours": sum(r.card_gpu_hours for r in rows),
        "full_recompute_gpu_hours": sum(r.full.gpu_hours for r in rows),
        "chosen_gpu_hours": sum(r.best.gpu_hours for r in rows),
        "chosen_kwh": sum(r.best.kwh for r in rows),
    }
