"""What does a training step cost, and what does keeping attention save? Ratios, each from one run.

    python benchmarks/train_step.py                          # all rows, a quarter of an hour
    python benchmarks/train_step.py kept --tokens 8192 --repeats 3

kept          two ranks, cp 2: tokens/s of train.recompute=attention_kept against full, and attention's share of a step.
two_ranks     two ranks against one rank, both attention_kept: times faster.
transformers  one process (attention_kept, mlp_chunk=2048) against transformers with SDPA and its own gradient
              checkpointing, same shapes and dtype, AdamW on both sides: times faster, and peak memory of forward and
              backward beyond the weights (gradients included on both sides).
breakdown     where the time of a step goes, one rank, by policy: self time of operators from torch's profiler.

Ranks have one thread each. Steps of the two sides alternate; a figure is the median over repeats of the ratio of
neighbours. A step is forward, backward, clipping and AdamW. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import megalong
from megalong.attention.meters import Stopwatch
from megalong.config.schema import ModelConfig, TrainConfig
from megalong.recipe.resolve import run_of
from megalong.runtime.ranks import RankPool

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)


class Ours:
    """The real trainer's parts on this rank, fed with one random sequence."""

    def __init__(self, tokens: int, precision: str, train: dict[str, Any], cp: int = 1) -> None:
        from megatron.core import parallel_state

        from megalong.model.gpt import build
        from megalong.topology.groups import initialize
        from megalong.training.schedule import scheduler
        from megalong.training.step import build_optimizer

        said = ["+stage=65k", "+scale=mini", "train.global_batch_size=1", f"precision={precision}"]
        run = run_of([*said, f"topology.cp={cp}"], cp)
        settings = TrainConfig(**{**vars(run.config.train), **train})
        self.run = replace(
            run,
            recompute=train.get("recompute", "attention_kept"),
            mlp_chunk=train.get("mlp_chunk", 0),
            config=replace(run.config, model=MODEL, train=settings),
            seq_length=tokens,
        )
        if not parallel_state.is_initialized():
            initialize(self.run.layout)
        self.model = build(self.run)
        self.optimizer = build_optimizer(self.run, self.model)
        self.schedule = scheduler(self.run, self.optimizer)
        ids = torch.randint(0, MODEL.vocab_size, (1, tokens // cp), generator=torch.Generator().manual_seed(0))
        self.batch = {"tokens": ids, "labels": ids, "loss_mask": torch.ones(1, tokens // cp), "document_starts": None}

    def step(self) -> None:
        """One optimizer step."""
        from megalong.training.step import train_step

        train_step(self.run, self.model, self.optimizer, self.schedule, itertools.repeat(self.batch), 0)

    def forward_backward(self) -> None:
        """Its gradients alone."""
        from megalong.training.forward import forward_backward

        forward_backward(self.run.seq_length, self.model, itertools.repeat(self.batch), 1)


class Theirs:
    """transformers' Llama of the same shape, with SDPA and gradient checkpointing."""

    def __init__(self, tokens: int, precision: str) -> None:
        import transformers

        from megalong.model.llama import model_to_hf

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        config = transformers.LlamaConfig(**model_to_hf(MODEL, window=tokens))
        config._attn_implementation = "sdpa"
        self.model = transformers.LlamaForCausalLM(config).to(dtype)
        self.model.config.use_cache = False
        self.model.gradient_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.ids = torch.randint(0, MODEL.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))

    def forward_backward(self) -> None:
        """Gradients of one sequence."""
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


class Took(NamedTuple):
    """Time of a step."""

    wall: float
    """Until all ranks were done."""
    processor: float
    """Of the rank that used most, its waiting not counted: other programs on the machine count less in it."""


def took(work: Callable[[], object]) -> Took:
    """Seconds of `work` on all ranks."""
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    work()
    mine = torch.tensor(time.process_time() - used)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return Took(time.perf_counter() - began, mine.item())


def times_faster(slow: list[Took], fast: list[Took]) -> dict[str, Any]:
    """Medians of the ratios of neighbours."""
    pairs = list(zip(slow, fast, strict=True))
    return {
        "times_faster": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
        "times_faster_by_processor_time": round(statistics.median(a.processor / b.processor for a, b in pairs), 3),
        "all": [(round(a.wall, 2), round(b.wall, 2)) for a, b in pairs],
    }


def rate(tokens: int, times: list[Took]) -> float:
    """Tokens per second of wall time."""
    return round(tokens / statistics.median(t.wall for t in times), 1)


def _kept(tokens: int, precision: str, repeats: int) -> tuple[dict[str, list[Took]], dict[str, list[float]]]:
    sides = {name: Ours(tokens, precision, {"recompute": name}, cp=2) for name in ("full", "attention_kept")}
    times: dict[str, list[Took]] = {name: [] for name in sides}
    attention: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side.forward_backward()  # connections, buffers
    for _ in range(repeats):
        for name, side in sides.items():
            watch = Stopwatch()
            with watch.running():
                times[name].append(took(side.step))
            attention[name].append(watch.seconds / times[name][-1].wall)
    return times, attention


def kept(tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    """attention_kept against full on two ranks."""
    with RankPool(threads=1) as pool:
        times, attention = pool.run(_kept, 2, tokens, precision, repeats, timeout_s=3600)[0]
    return {
        **times_faster(times["full"], times["attention_kept"]),
        "tokens_per_second": {name: rate(tokens, found) for name, found in times.items()},
        "attention_share_of_a_step": {name: round(statistics.median(x), 3) for name, x in attention.items()},
        "wanted": 1.15,
    }


def _step(tokens: int, precision: str, cp: int) -> Took:
    side = Ours(tokens, precision, {}, cp)
    side.forward_backward()
    return took(side.step)


def two_ranks(tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    """Two ranks against one, step by step in turn."""
    times: dict[int, list[Took]] = {1: [], 2: []}
    with RankPool(threads=1) as pool:
        for _ in range(repeats):
            for cp, found in times.items():
                found.append(pool.run(_step, cp, tokens, precision, cp, timeout_s=3600)[0])
    return {
        **times_faster(times[1], times[2]),
        "tokens_per_second": {f"{cp} ranks": rate(tokens, found) for cp, found in times.items()},
        "wanted": 1.8,
    }


def highest(work: Callable[[], object]) -> int:
    """Most bytes above those before that `work` holds at a time, from every allocation of torch."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    events = sorted((e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in events), initial=0))


def _against(tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    ours, theirs = Ours(tokens, precision, {"mlp_chunk": 2048}), Theirs(tokens, precision)
    gradients = sum(b.grad_data.numel() * b.grad_data.element_size() for b in ours.model[0].buffers)
    memory = {"ours": gradients + highest(ours.forward_backward), "theirs": highest(theirs.forward_backward)}
    times: dict[str, list[Took]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        times["ours"].append(took(ours.step))
        times["theirs"].append(took(theirs.step))
    return {"memory": memory, "gradients": gradients, "times": times}


def transformers(tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    """One process of one thread, ours against transformers."""
    with RankPool(threads=1) as pool:
        found = pool.run(_against, 1, tokens, precision, repeats, timeout_s=3600)[0]
    times, memory = found["times"], found["memory"]
    return {
        **times_faster(times["theirs"], times["ours"]),
        "tokens_per_second": {name: rate(tokens, found) for name, found in times.items()},
        "memory_share": round(memory["ours"] / memory["theirs"], 3),
        "memory_mib": {name: round(size / 2**20, 1) for name, size in memory.items()},
        "of_which_our_gradients_mib": round(found["gradients"] / 2**20, 1),
        "wanted": {"times_faster": 1.2, "memory_share": 0.8},
    }


PARTS = {
    "attention": ("flash_attention",),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul"),
    "optimizer": ("_fused_adam", "_foreach", "aten::sqrt", "aten::addcdiv"),
    "communication": ("gloo", "c10d"),
}


def _breakdown(tokens: int, precision: str, policy: dict[str, Any]) -> dict[str, float]:
    side = Ours(tokens, precision, policy)
    side.step()
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        side.step()
    found: Counter[str] = Counter()
    for event in prof.key_averages():
        part = next((p for p, names in PARTS.items() if any(n in event.key for n in names)), "elementwise and the rest")
        found[part] += event.self_cpu_time_total
    total = sum(found.values())
    return {"seconds": round(total / 1e6, 2), **{part: round(t / total, 3) for part, t in found.most_common()}}


def breakdown(tokens: int, precision: str, repeats: int) -> dict[str, Any]:
    """Shares of a step's time on one thread, by policy."""
    policies = {
        "full": {"recompute": "full"},
        "attention_kept": {"recompute": "attention_kept"},
        "attention_kept, mlp in tiles": {"recompute": "attention_kept", "mlp_chunk": 1024},
    }
    with RankPool(threads=1) as pool:
        return {name: pool.run(_breakdown, 1, tokens, precision, p, timeout_s=3600)[0] for name, p in policies.items()}


ROWS = {"kept": kept, "two_ranks": two_ranks, "transformers": transformers, "breakdown": breakdown}


def commit() -> str:
    """Of the working tree, marked where it has changes."""
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)}; all by default")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; choose from {', '.join(ROWS)}")
    result: dict[str, Any] = {
        "hardware": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "megalong": megalong.__version__},
        "commit": commit(),
        "tokens": args.tokens,
        "precision": args.precision,
    }
    for name in args.rows or ROWS:
        result[name] = ROWS[name](args.tokens, args.precision, args.repeats)
        print(f"{name}: {json.dumps(result[name])}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
