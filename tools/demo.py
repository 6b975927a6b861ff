"""From Hugging Face through all four stages and back, on this machine: what `make demo` runs.

Builds a corpus of Python sources, trains a mini Llama on it at a window of 32 tokens, walks it through the four stages
by torchrun on four CPU ranks with a different layout each, exports it, and lets transformers read the result. All of it
lands in outputs/demo, which is made anew each time; the corpus in it is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing may be fetched

from base_model import make_base_model, mini_model

from megalong.config.schema import Config
from megalong.data.builtin import builtin_corpus, builtin_tokenizer
from megalong.evaluation.plots import plot_loss_by_position
from megalong.evaluation.results import StageEvaluation, read_evaluation
from megalong.recipe.compose import compose, from_yaml
from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from megalong.topology.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs" / "demo"
RANKS = 4
# One axis after the other is put to work: tensor + sequence parallel, pipeline, ring x data parallel, one long ring.
LAYOUTS = {"65k": Layout(tp=2, dp=2), "262k": Layout(pp=2, cp=2), "524k": Layout(cp=2, dp=2), "1048k": Layout(cp=4)}
EVAL_SEQUENCES = 8
PRECISION = "fp32"  # bf16 is no faster on most CPUs
PROMPT = "def __init__(self"
NEW_TOKENS = 120


@dataclass(frozen=True)
class StageResult:
    """One trained stage."""

    config: Config
    evaluation: StageEvaluation
    tokens_per_second: float
    """Of all ranks, median over the steps after the first; whole steps, data loading included."""

    def summary(self) -> dict[str, Any]:
        """The stage's row of summary.json."""
        stage, topology = self.config.stage, self.config.topology
        after = self.evaluation.after
        assert after is not None
        return {
            "name": stage.name,
            "seq_length": stage.seq_length,
            "theta": stage.theta,
            "layout": {axis: getattr(topology, axis) for axis in ("tp", "cp", "pp", "dp")},
            "steps": self.config.train.steps,
            "tokens_per_second": self.tokens_per_second,
            "loss_last_quarter_before": self.evaluation.before.last_quarter,
            "loss_last_quarter_after": after.last_quarter,
        }


def main() -> int:
    """Run the demo; returns the exit code."""
    begun = time.monotonic()
    _make_room()
    cache = OUT / "corpus"
    model = mini_model()
    with _part("1/5 corpus: Python sources of this machine, a BPE tokenizer trained on them"):
        windows = {name: compose([f"+stage={name}", "+scale=mini"]).stage.seq_length for name in LAYOUTS}
        tokenizer = builtin_tokenizer(cache, model.vocab_size)
        base_data = builtin_corpus(cache, model.max_position_embeddings, model.vocab_size)
        data = {name: builtin_corpus(cache, window, model.vocab_size) for name, window in windows.items()}
        print(f"{cache}: {model.vocab_size:,} tokens of vocabulary, windows of {', '.join(map(str, windows.values()))}")
    with _part("2/5 base model: a mini Llama as a Hugging Face checkpoint"):
        base = make_base_model(base_data, tokenizer, OUT / "base")
        print(
            f"held-out loss {base.held_out_loss:.3f} nats against a unigram entropy of {base.unigram_entropy:.3f}, "
            f"after {base.steps:,} steps, {base.tokens:,} tokens"
        )
    stages: list[StageResult] = []
    start = OUT / "base"
    for name, layout in LAYOUTS.items():
        with _part(f"3/5 stage {name}: window {windows[name]:,}, {layout}"):
            stages.append(_train_stage(name, layout, start, data[name]))
        start = OUT / name
    with _part("4/5 export to Hugging Face, read by transformers"):
        _convert(start, OUT / "hf")
        text = _generate(OUT / "hf")
        print(text)
    with _part("5/5 what came of it"):
        _report(stages, text)
    print(f"\nmake demo: {time.monotonic() - begun:.0f} s. Everything is in {OUT.relative_to(ROOT)}/")
    return EXIT_OK


def _make_room() -> None:
    """Remove what an earlier demo left, but for its corpus."""
    OUT.mkdir(parents=True, exist_ok=True)
    for path in OUT.iterdir():
        if path.is_dir() and path.name != "corpus":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


@contextmanager
def _part(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    begun = time.monotonic()
    yield
    print(f"-- {time.monotonic() - begun:.1f} s", flush=True)


def _run(command: list[str]) -> None:
    """Run a command of this repository with its output on ours.

    Raises:
        UserError: it failed.
    """
    print("$ " + " ".join(command), flush=True)
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    program = [sys.executable, *(["-m", "torch.distributed.run"] if command[0] == "torchrun" else [])]
    done = subprocess.run([*program, *command[1:]], cwd=ROOT, env=environment)
    if done.returncode:
        raise UserError(f"{command[0]} ended with exit code {done.returncode}; its own message is above.")


def _train_stage(name: str, layout: Layout, init_from: Path, data: Path) -> StageResult:
    run_dir = OUT / name
    sizes = [f"topology.{axis}={getattr(layout, axis)}" for axis in ("tp", "cp", "pp", "dp")]
    places = {"init_from": init_from, "data.path": data, "run_dir": run_dir}
    _run(
        [
            *("torchrun", "--standalone", f"--nproc-per-node={RANKS}", "megalong/pretrain.py"),
            *(f"+stage={name}", "+scale=mini", *sizes),
            *(f"{key}={path.relative_to(ROOT)}" for key, path in places.items()),
            *(f"data.eval_sequences={EVAL_SEQUENCES}", f"precision={PRECISION}"),
        ]
    )
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [RANKS * step["tokens_per_second_per_gpu"] for step in steps]
    config = from_yaml((run_dir / "config.yaml").read_text())
    return StageResult(config, read_evaluation(run_dir), statistics.median(speeds[1:] or speeds))


def _convert(run_dir: Path, out: Path) -> None:
    source, target = (str(p.relative_to(ROOT)) for p in (run_dir, out))
    _run(["python", "tools/convert.py", "megatron-to-hf", source, target])


def _generate(folder: Path) -> str:
    """Text that transformers generates from the exported checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    eos = tokenizer.eos_token_id
    tokens = model.generate(
        **prompt,
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _report(stages: list[StageResult], text: str) -> None:
    rows = [stage.summary() for stage in stages]
    (OUT / "summary.json").write_text(
        json.dumps({"stages": rows, "hf_dir": str(OUT / "hf"), "generated_text": text}, indent=1) + "\n"
    )
    panels = {
        f"stage {row['name']} at mini scale: {row['seq_length']:,} tokens": stage.evaluation
        for row, stage in zip(rows, stages, strict=True)
    }
    plot_loss_by_position(panels, OUT / "loss_by_position.png", "Loss by position before and after each stage")
    print(f"{'':6} {'':>6} {'':>13} {'':>23} {'':>5} {'':>8}  loss, last quarter")
    print(
        f"{'stage':6} {'window':>6} {'theta':>13} {'layout':>23} {'steps':>5} {'tokens/s':>8} {'before':>8} {'after':>8}"
    )
    for row in rows:
        print(
            f"{row['name']:6} {row['seq_length']:6,} {row['theta']:13,.0f} {Layout(**row['layout'])!s:>23} "
            f"{row['steps']:5} {row['tokens_per_second']:8,.0f} {row['loss_last_quarter_before']:8.3f} "
            f"{row['loss_last_quarter_after']:8.3f}"
        )
    print(f"tokens/s: all {RANKS} ranks, median over whole steps, data loading included; loss: nats, held-out text")
    print("summary.json, loss_by_position.png; tensorboard --logdir outputs/demo")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
