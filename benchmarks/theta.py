"""Which law lengthens a window best at equal tokens? One base model, eight ways, two windows, several seeds.

  python benchmarks/theta.py [--out outputs/theta] [--device cpu|cuda] [--seeds 3] [--workers 2] [--scale 1.0]

The base is a small Llama trained at a window of 128 tokens on documents of notes (megalong/evaluation/notes.py), so it
has learned to look up what stands in its window. Then 8 and 32 times that window, at equal tokens, under: theta
unchanged, linear interpolation, NTK from the base, dynamic NTK chained from window to window, the scaling law, YaRN,
and what the search of tools/find_theta.py picks; and the chained law once more with its tokens shared out over the
windows in between. Questions are those of `recall`, tools/evaluate.py's own. Prints a table, writes two pictures, and
one JSON object as the last line. Figures and what they mean: docs/theta.md.

`--scale` multiplies all tokens of training; 0.003 only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.evaluation.haystack import Haystack
from megalong.evaluation.notes import VALUES, Notes, write_tokenizer
from megalong.evaluation.sample import NOWHERE
from megalong.evaluation.suite import Cell, Grid, Suite, make_suite
from megalong.evaluation.tasks import NOUNS
from megalong.evaluation.theta_search import Budget, Scores, Search, candidates, plan_schedule
from megalong.evaluation.tokens import PromptTokenizer
from megalong.rope.bound import first_negative, plain_frequencies
from megalong.rope.theta import RotaryPoint, dynamic_ntk, scaling_law

BASE, WINDOWS, HEAD_DIM = RotaryPoint(10_000.0, 128), (1024, 4096), 32
BASE_TOKENS, LONG_TOKENS = 2_000_000, 200_000
BASE_RATE, LONG_RATE = 3e-3, 5e-4
STEP_TOKENS = 4096
DEPTHS = (0.05, 0.35, 0.65, 0.95)
QUESTIONS = 9
"""At each length and depth."""
HELD_OUT = 65_536
"""Tokens of held-out documents as long as the window; the same for every model."""


class Material:
    """Text of this language as ids, and questions about it.

    Args:
        folder: of the tokenizer; made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.exists():
            write_tokenizer(folder)
        self.tokenizer = PromptTokenizer(folder)
        self.ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]

    def batch(self, notes: Notes, count: int, length: int) -> torch.Tensor:
        """[count, length] ids of as many documents."""
        return torch.tensor([[self.ids[w] for w in notes.document(length).split()] for _ in range(count)])

    @cache  # noqa: B019 - one of these lives as long as the process
    def questions(self, lengths: tuple[int, ...]) -> Suite:
        """Each hidden in a document about other keys."""
        text = Notes(77).document(max(lengths) * 2, NOUNS).split()
        # between two notes, as in the language: never between a key and its answer
        pieces = [text[i : i + 1 + text[i].endswith(":")] for i in range(len(text)) if not text[i - 1].endswith(":")]
        hay = Haystack([[self.ids[w] for w in piece] for piece in pieces], "notes", True)
        return make_suite(Grid(("recall",), lengths, DEPTHS, QUESTIONS), self.tokenizer, hay)


@dataclass(frozen=True)
class Arm:
    """One way to a window."""

    name: str
    path: list[tuple[int, float, dict[str, Any]]]
    """(window, theta, rope dict) of each part of the training, the last one the arm's own."""


def arms(window: int) -> list[Arm]:
    """All ways but the search's."""
    factor = window / BASE.window
    chain: list[tuple[int, float, dict[str, Any]]] = []
    point = BASE
    while point.window < window:
        longer = min(4 * point.window, window)
        point = RotaryPoint(dynamic_ntk(point, longer, HEAD_DIM, 4.0), longer)
        chain.append((longer, point.theta, {}))
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": BASE.window}
    return [
        Arm("unchanged", [(window, BASE.theta, {})]),
        Arm("linear", [(window, BASE.theta, {"rope_type": "linear", "factor": factor})]),
        Arm("NTK from the base", [(window, dynamic_ntk(BASE, window, HEAD_DIM, 1.0), {})]),
        Arm("chained NTK, one jump", [(window, point.theta, {})]),
        Arm("chained NTK, stages", chain),
        Arm("scaling law", [(window, scaling_law(BASE, window), {})]),
        Arm("YaRN", [(window, BASE.theta, yarn)]),
    ]


class Bench:
    """Trains and measures; one in every process."""

    def __init__(self, device: str, scale: float, out: Path) -> None:
        self.device, self.scale, self.material = device, scale, Material(out / "tokenizer")

    def model(self, window: int, theta: float, rope: dict[str, Any], weights: dict[str, Any] | None) -> Any:
        config = LlamaConfig(
            vocab_size=len(self.material.ids),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=HEAD_DIM,
            max_position_embeddings=window,
            rope_parameters={"rope_type": "default", **rope, "rope_theta": theta},
            initializer_range=0.06,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(self.device)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    def train(self, model: Any, window: int, tokens: int, rate: float, seed: int, rows: int | None = None) -> None:
        """AdamW with a rate that decays to a tenth."""
        notes = Notes(seed + 1)
        rows = rows or max(1, STEP_TOKENS // window)
        steps = max(1, tokens // (rows * window))
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 20)) * (1.0 - 0.9 * step / steps)
            batch = self.material.batch(notes, rows, window + 1).to(self.device)
            self._losses(model, batch).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def _losses(model: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")

    def held_out(self, window: int) -> int:
        """Documents that the last quarter is measured on."""
        return max(1, int(HELD_OUT * min(1.0, 10 * self.scale)) // window)

    @torch.no_grad()
    def measure(self, model: Any, window: int, questions: bool = True) -> dict[str, Any]:
        """Last-quarter loss, loss within the base window, answers found by length and depth."""
        held_out = Notes(10_000)
        quarters = [
            self._losses(model, self.material.batch(held_out, 1, window + 1).to(self.device))[
                :, -(window // 4) :
            ].mean()
            for _ in range(self.held_out(window))
        ]
        short = self._losses(model, self.material.batch(Notes(20_000), 64, BASE.window + 1).to(self.device)).mean()
        found: dict[str, Any] = {"last_quarter": float(torch.stack(quarters).mean()), "short": float(short)}
        return found | (self._questions(model, window) if questions else {})

    def _questions(self, model: Any, window: int) -> dict[str, Any]:
        suite = self.material.questions(tuple(sorted({BASE.window, window // 4, window})))
        grid: dict[str, list[bool]] = {}
        groups: dict[str, list[tuple[Cell, torch.Tensor, int]]] = {}
        for cell, sample in zip(suite.cells, suite.samples, strict=True):
            (at,) = (sample.slots != NOWHERE).nonzero().flatten().tolist()  # an answer is one token
            groups.setdefault(f"{cell.length}@{cell.depth:g}", []).append((cell, sample.tokens, at))
        for name, group in groups.items():
            for _, tokens, at in group:
                logits = model(input_ids=tokens[None, :at].to(self.device), use_cache=False, logits_to_keep=1).logits
                grid.setdefault(name, []).append(int(logits[0, -1].argmax()) == int(tokens[at]))
        shares = {name: statistics.fmean(hits) for name, hits in grid.items()}
        own = [share for name, share in shares.items() if name.startswith(f"{window}@")]
        return {"needle": statistics.fmean(own), "grid": shares}

    def lengthen(self, base: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
        weights: dict[str, Any] = base
        for window, theta, rope in arm.path:
            model = self.model(window, theta, rope, weights)
            self.train(model, window, int(LONG_TOKENS * self.scale) // len(arm.path), LONG_RATE, seed)
            weights = model.state_dict()
        return self.measure(model, arm.path[-1][0])

    def search(self, base: dict[str, Any], window: int, base_short: float) -> tuple[float, int]:
        """What the search of tools/find_theta.py picks with sixteen times the tokens of one run, and what it spent."""
        step = max(STEP_TOKENS, window)
        budget = Budget(max(800_000, int(16 * LONG_TOKENS * self.scale)), step, self.held_out(window) * window, 0)

        def measured(theta: float, steps: int, seed: int, needles: bool) -> Scores:
            model = self.model(window, theta, {}, base)
            if steps:
                self.train(model, window, steps * step, LONG_RATE, 100 + seed)
            found = self.measure(model, window, needles)
            return Scores(found["last_quarter"], found["short"], found.get("needle"))

        thetas = candidates(BASE, BASE, window, HEAD_DIM, 4.0, 6)
        schedule = plan_schedule(len(thetas), 1, budget)
        found = Search(measured, budget, 0).run(thetas, schedule, window, thetas[0], base_short)
        return found.theta, found.tokens


_BENCH: Bench


def _start(device: str, scale: float, out: Path, threads: int) -> None:
    global _BENCH
    torch.set_num_threads(threads)
    _BENCH = Bench(device, scale, out)


def _search(base: dict[str, Any], window: int, base_short: float) -> tuple[float, int]:
    return _BENCH.search(base, window, base_short)


def _lengthen(base: dict[str, Any], arm: Arm, seed: int) -> dict[str, Any]:
    return _BENCH.lengthen(base, arm, seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/theta"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that train side by side")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    windows, begun = [int(w) for w in given.windows.split(",")], time.monotonic()
    bench = Bench(given.device, given.scale, given.out)
    model = bench.model(BASE.window, BASE.theta, {}, None)
    bench.train(model, BASE.window, int(BASE_TOKENS * given.scale), BASE_RATE, 0, rows=8)
    base, start = model.state_dict(), bench.measure(model, BASE.window)
    print(
        f"base: {start['needle']:.0%} found at {BASE.window} (chance {1 / len(VALUES):.0%}), loss "
        f"{start['short']:.4f}, {(time.monotonic() - begun) / 60:.1f} minutes",
        flush=True,
    )
    threads = max(1, (os.cpu_count() or 1) // given.workers)
    settings = (given.device, given.scale, given.out, threads)
    with ProcessPoolExecutor(given.workers, get_context("spawn"), _start, settings) as pool:
        searches = {w: pool.submit(_search, base, w, start["short"]) for w in sorted(windows, reverse=True)}
        running = [
            (w, arm, [pool.submit(_lengthen, base, arm, s) for s in range(given.seeds)])
            for w in windows
            for arm in arms(w)
        ]
        for w in windows:
            theta, spent = searches[w].result()
            print(f"{w}: the search picks {theta:,.0f} with {spent:,} tokens", flush=True)
            arm = Arm("searched", [(w, theta, {})])
            running.append((w, arm, [pool.submit(_lengthen, base, arm, s) for s in range(given.seeds)]))
        rows = []
        for w, arm, runs in sorted(running, key=lambda r: r[0]):
            row = _row(w, arm, [run.result() for run in runs], start["short"])
            row["search_tokens"] = searches[w].result()[1] if arm.name == "searched" else 0
            rows.append(row)
            print(_line(row), flush=True)
    _draw(rows, given.out / "theta_laws.png")
    _draw_grid(rows, given.out / "theta_recall.png")
    print(
        json.dumps(
            {
                "rows": rows,
                "base": start,
                "seeds": given.seeds,
                "scale": given.scale,
                "minutes": (time.monotonic() - begun) / 60,
                "device": given.device,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "commit": subprocess.run(
                    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
                ).stdout.strip(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )
    return 0


def _row(window: int, arm: Arm, found: list[dict[str, Any]], base_short: float) -> dict[str, Any]:
    theta, rope = arm.path[-1][1:]
    row: dict[str, Any] = {"window": window, **asdict(arm), "theta": theta}
    row["passes_bound"] = None if rope else first_negative(plain_frequencies(theta, HEAD_DIM), window) is None
    for name in ("last_quarter", "needle", "short"):
        values = [f[name] for f in found]
        row[name] = statistics.fmean(values)
        row[f"{name}_spread"] = statistics.stdev(values) if len(values) > 1 else math.nan
    row["harm"] = row["short"] - base_short
    row["grid"] = {k: statistics.fmean(f["grid"][k] for f in found) for k in found[0]["grid"]}
    return row


def _line(row: dict[str, Any]) -> str:
    bound = {True: "yes", False: "no", None: "-"}[row["passes_bound"]]
    return (
        f"{row['window']:5}  {row['name']:22} theta {row['theta']:>14,.0f}  bound {bound:3}  "
        f"last quarter {row['last_quarter']:.4f} +- {row['last_quarter_spread']:.4f}  "
        f"found {row['needle']:.0%} +- {row['needle_spread']:.0%}  "
        f"short {row['harm']:+.4f} +- {row['short_spread']:.4f}"
    )


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and answers found as bars with their spread over seeds, a column per window."""
    windows = sorted({r["window"] for r in rows})
    figure, panels = _figure(5.2 * len(windows) + 1, 6.5, 2, len(windows))
    for column, window in enumerate(windows):
        own = [r for r in reversed(rows) if r["window"] == window]
        for panel, name, label in (
            (panels[0][column], "last_quarter", "loss, last quarter of the window (nats per token)"),
            (panels[1][column], "needle", "share of notes found in the whole window"),
        ):
            values = [r[name] for r in own]
            panel.barh([r["name"] for r in own], values, xerr=[r[f"{name}_spread"] for r in own], color="#56B4E9")
            panel.set_xlabel(label)
            panel.set_title(f"window {window:,}")
        best = min(r["last_quarter"] for r in own)
        panels[0][column].set_xlim(left=best - 0.1)
    figure.savefig(path, dpi=110)


def _draw_grid(rows: list[dict[str, Any]], path: Path) -> None:
    """Answers found by length and depth, a panel per way and window."""
    windows = sorted({r["window"] for r in rows})
    names = list(dict.fromkeys(r["name"] for r in rows))
    figure, panels = _figure(2.3 * len(names) + 1, 2.6 * len(windows), len(windows), len(names))
    for row in rows:
        panel = panels[windows.index(row["window"])][names.index(row["name"])]
        keys = [(int(length), float(depth)) for length, depth in (k.split("@") for k in row["grid"])]
        lengths, depths = sorted({k[0] for k in keys}), sorted({k[1] for k in keys})
        panel.imshow(
            [[row["grid"][f"{n}@{d:g}"] for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto"
        )
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                panel.text(x, y, f"{row['grid'][f'{length}@{depth:g}']:.0%}", ha="center", va="center", fontsize=7)
        panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        panel.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
        panel.set_title(f"{row['name']}, {row['window']:,}", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
