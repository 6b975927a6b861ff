"""Which law lengthens a window best at equal tokens? One base model, seven ways, two windows, several seeds.

  python benchmarks/theta.py [--out outputs/theta] [--device cpu|cuda] [--seeds 3] [--scale 1.0]

The base is a small Llama trained at a window of 128 tokens on a made-up language with long-range structure: records
`KEY k v v` lie in text of a random grammar, and now and then `ASK k` is answered by the values of that key, so the base
learns to retrieve inside its window. Then 8 and 32 times that window, at equal tokens, under: theta unchanged, linear
interpolation, NTK from the base, dynamic NTK chained from window to window, the scaling law, YaRN, and what the search
of tools/find_theta.py picks; and the chained law once more with its tokens shared out over the windows in between.
Prints a table, writes a picture, and one JSON object as the last line. Figures and what they mean: docs/theta.md.

`--scale` multiplies all tokens of training; 0.003 only shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.evaluation.theta_search import Budget, Scores, Search, candidates, plan_schedule
from megalong.rope.bound import first_negative, plain_frequencies
from megalong.rope.theta import RotaryPoint, dynamic_ntk, scaling_law

BASE, WINDOWS, HEAD_DIM = RotaryPoint(10_000.0, 128), (1024, 4096), 32
KEYS, VALUES, WORDS = 64, 64, 120
KEY, ASK = 0, 1  # token ids; keys, values and words follow
FIRST_KEY, FIRST_VALUE, FIRST_WORD = 2, 2 + KEYS, 2 + KEYS + VALUES
VOCABULARY = FIRST_WORD + WORDS
BASE_TOKENS, LONG_TOKENS = 6_000_000, 400_000
DEPTHS = (0.0, 0.25, 0.5, 0.75, 0.95)


class Language:
    """Endless sequences: a random bigram grammar, records, and questions about them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        grammar = np.random.default_rng(0)  # the same language for every seed
        self.next = grammar.integers(0, WORDS, (WORDS, 4))

    def sequence(self, length: int) -> np.ndarray:
        """[length] ids; a question every 24 tokens or so, about a record anywhere before it."""
        out: list[int] = []
        known: dict[int, list[int]] = {}
        word = int(self.rng.integers(WORDS))
        while len(out) < length:
            draw = self.rng.random()
            if draw < 0.06 and len(known) < KEYS:
                key = int(self.rng.choice([k for k in range(KEYS) if k not in known]))
                known[key] = [int(v) + FIRST_VALUE for v in self.rng.integers(0, VALUES, 2)]
                out += [KEY, FIRST_KEY + key, *known[key]]
            elif draw < 0.12 and known:
                key = int(self.rng.choice(list(known)))
                out += [ASK, FIRST_KEY + key, *known[key]]
            else:
                word = int(self.next[word, self.rng.integers(4)])
                out.append(FIRST_WORD + word)
        return np.array(out[:length])

    def batch(self, count: int, length: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([self.sequence(length) for _ in range(count)])).long()

    def needles(self, count: int, length: int, depth: float) -> torch.Tensor:
        """Sequences whose last four tokens ask for the only record of its key, which lies at `depth`."""
        rows = []
        for _ in range(count):
            text = self.sequence(length - 8)
            key, values = int(self.rng.integers(KEYS)), self.rng.integers(0, VALUES, 2) + FIRST_VALUE
            others = (np.arange(KEYS) + 1 + key) % KEYS
            text[text == FIRST_KEY + key] = FIRST_KEY + int(others[int(self.rng.integers(KEYS - 1))])
            at = int(depth * len(text))
            rows.append(
                np.concatenate((text[:at], [KEY, FIRST_KEY + key, *values], text[at:], [ASK, FIRST_KEY + key, *values]))
            )
        return torch.from_numpy(np.stack(rows)).long()


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
    """Trains and measures."""

    def __init__(self, device: str, scale: float, out: Path) -> None:
        self.device, self.scale, self.out = device, scale, out

    def model(
        self, window: int, theta: float, rope: dict[str, Any], weights: dict[str, Any] | None
    ) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=HEAD_DIM,
            max_position_embeddings=window,
            rope_parameters={"rope_type": "default", **rope, "rope_theta": theta},
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(self.device)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    def train(self, model: LlamaForCausalLM, window: int, tokens: int, rate: float, seed: int) -> None:
        language = Language(seed + 1)
        rows = max(1, 4096 // window)
        steps = max(1, int(tokens * self.scale) // (rows * window))
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, steps // 20)) * (1.0 - 0.9 * step / steps)
            batch = language.batch(rows, window + 1).to(self.device)
            loss = self._losses(model, batch).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @staticmethod
    def _losses(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM, window: int) -> dict[str, Any]:
        """Last-quarter loss, loss within the base window, needle accuracy by length and depth; held-out text."""
        held_out = Language(10_000)
        count = max(1, int(8192 * max(self.scale, 0.1)) // window)
        losses = self._losses(model, held_out.batch(count, window + 1).to(self.device))
        short = self._losses(model, held_out.batch(32, BASE.window + 1).to(self.device)).mean()
        grid = {}
        for length in sorted({BASE.window, window // 4, window // 2, window}):
            for depth in DEPTHS:
                rows = held_out.needles(max(2, int(16 * self.scale)), length, depth).to(self.device)
                found = model(input_ids=rows[:, :-1], use_cache=False).logits[:, -2:].argmax(-1) == rows[:, -2:]
                grid[f"{length}@{depth:g}"] = float(found.all(-1).float().mean())
        own = [v for k, v in grid.items() if k.startswith(f"{window}@")]
        return {
            "last_quarter": float(losses[:, -(window // 4) :].mean()),
            "short": float(short),
            "needle": statistics.fmean(own),
            "grid": grid,
        }

    def lengthen(self, base: dict[str, Any], arm: Arm, seed: int, tokens: int = LONG_TOKENS) -> dict[str, Any]:
        weights: dict[str, Any] = base
        for window, theta, rope in arm.path:
            model = self.model(window, theta, rope, weights)
            self.train(model, window, tokens // len(arm.path), 5e-4, seed)
            weights = model.state_dict()
        return self.measure(model, arm.path[-1][0])

    def search(self, base: dict[str, Any], window: int, base_short: float) -> tuple[float, int]:
        """What the search of tools/find_theta.py picks with twelve times the tokens of one run, and what it spent."""
        step = max(1, 4096 // window) * window
        budget = Budget(max(250_000, int(12 * LONG_TOKENS * self.scale)), step, 2 * window, 8 * window)

        def measured(theta: float, steps: int, seed: int, needles: bool) -> Scores:
            model = self.model(window, theta, {}, base)
            if steps:
                self.train(model, window, int(steps * step / self.scale), 5e-4, 100 + seed)
            found = self.measure(model, window)
            return Scores(found["last_quarter"], found["short"], found["needle"] if needles else None)

        thetas = candidates(BASE, BASE, window, HEAD_DIM, 4.0, 6)
        schedule = plan_schedule(len(thetas), 1, budget)
        found = Search(measured, budget, 0).run(thetas, schedule, window, thetas[0], base_short)
        return found.theta, found.tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/theta"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--windows", default=",".join(map(str, WINDOWS)))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench, begun = Bench(given.device, given.scale, given.out), time.monotonic()
    model = bench.model(BASE.window, BASE.theta, {}, None)
    bench.train(model, BASE.window, BASE_TOKENS, 2e-3, 0)
    base, start = model.state_dict(), bench.measure(model, BASE.window)
    print(
        f"base: needle {start['needle']:.0%} at {BASE.window} (chance {VALUES**-2:.2%}), loss {start['short']:.4f}",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for window in map(int, given.windows.split(",")):
        picked, spent = bench.search(base, window, start["short"])
        every = [*arms(window), Arm("searched", [(window, picked, {})])]
        for arm in every:
            found = [bench.lengthen(base, arm, seed) for seed in range(given.seeds)]
            row = _row(window, arm, found, start["short"])
            row["search_tokens"] = spent if arm.name == "searched" else 0
            rows.append(row)
            print(_line(row), flush=True)
    minutes = (time.monotonic() - begun) / 60
    _draw(rows, given.out / "theta_laws.png")
    print(
        json.dumps(
            {
                "rows": rows,
                "base": start,
                "seeds": given.seeds,
                "scale": given.scale,
                "minutes": minutes,
                "device": given.device,
                "machine": platform.processor() or platform.machine(),
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
    return (
        f"{row['window']:5}  {row['name']:22} theta {row['theta']:>14,.0f}  last quarter {row['last_quarter']:.4f} "
        f"+- {row['last_quarter_spread']:.4f}  needle {row['needle']:.0%} +- {row['needle_spread']:.0%}  "
        f"short {row['harm']:+.4f} +- {row['short_spread']:.4f}"
    )


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    windows = sorted({r["window"] for r in rows})
    figure = Figure(figsize=(5.2 * len(windows) + 1, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(windows), squeeze=False)
    for column, window in enumerate(windows):
        own = [r for r in rows if r["window"] == window]
        for panel, name, label in (
            (panels[0][column], "last_quarter", "loss, last quarter"),
            (panels[1][column], "needle", "needles found"),
        ):
            panel.barh([r["name"] for r in own], [r[name] for r in own], xerr=[r[f"{name}_spread"] for r in own])
            panel.set_xlabel(label)
            panel.set_title(f"window {window:,}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
