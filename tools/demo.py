"""From Hugging Face through all four stages and back, on this machine: what `make demo` runs.

Writes documents in a language in which context helps (megalong/evaluation/notes.py), trains a small Llama on them at a
window of 32 tokens, walks it through the four stages by torchrun on four CPU ranks with a different layout each,
exports it, and lets transformers read the result. All of it lands in outputs/demo, which is made anew each time; the
text in it is kept.
"""

from __future__ import annotations

import fcntl
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
from typing import IO, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here; nothing may be fetched
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for each other crawl on a machine in use

import torch
from base_model import BATCH, STEPS, demo_model, make_base_model
from demo_text import EVAL_FRACTION, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megalong.checkpoint.checksums import CARD
from megalong.config.schema import Config
from megalong.data.dataset import SequenceDataset
from megalong.data.loader import evaluation_batches
from megalong.data.windows import Part
from megalong.evaluation.heatmap import draw
from megalong.evaluation.plots import plot_loss_by_position
from megalong.evaluation.position import LossByPosition, bucket_edges, bucket_sums, paired
from megalong.evaluation.results import Asked, StageEvaluation, read_evaluation
from megalong.evaluation.scores import Evaluation
from megalong.recipe.compose import from_yaml
from megalong.recipe.resolve import run_of
from megalong.runtime.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from megalong.topology.layout import Layout

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "outputs" / "demo"
RANKS = 4
# One axis after the other is put to work: tensor + sequence parallel, pipeline, ring x data parallel, one long ring.
LAYOUTS = {"65k": Layout(tp=2, dp=2), "262k": Layout(pp=2, cp=2), "524k": Layout(cp=2, dp=2), "1048k": Layout(cp=4)}
EVAL_SEQUENCES = 16
QUESTIONS = 8
"""At each depth, of the window's length."""
DEPTHS = (0.1, 0.5, 0.9)
PRECISION = "fp32"  # bf16 is no faster on most CPUs
ASKED = 8
"""Held-out documents that transformers is asked about."""
TOLERANCE = 1e-3
"""Nats by which two fp32 implementations may differ in a mean loss."""


@dataclass(frozen=True)
class StageResult:
    """One trained stage."""

    config: Config
    evaluation: StageEvaluation
    tokens_per_second: float
    """Of all ranks, median over the steps after the first; whole steps, data loading included."""

    def summary(self) -> dict[str, Any]:
        """The stage's row of summary.json."""
        stage, topology, found = self.config.stage, self.config.topology, self.evaluation
        before, after = found.asked_before, found.asked_after
        assert found.after is not None
        assert before is not None
        assert after is not None
        change = paired(found.before, found.after)
        assert change is not None
        return {
            "name": stage.name,
            "seq_length": stage.seq_length,
            "theta": stage.theta,
            "layout": {axis: getattr(topology, axis) for axis in ("tp", "cp", "pp", "dp")},
            "steps": self.config.train.steps,
            "tokens_per_second": self.tokens_per_second,
            "loss_last_quarter_before": found.before.last_quarter,
            "loss_last_quarter_after": found.after.last_quarter,
            "loss_change": change[0],
            "loss_change_error": change[1],
            "recall_before": _recall(before),
            "recall_after": _recall(after),
            "short_loss_before": before.short_loss,
            "short_loss_after": after.short_loss,
        }


def _recall(asked: Asked) -> float:
    return statistics.fmean(cell.exact for cell in asked.cells)


def main() -> int:
    """Run the demo; returns the exit code."""
    begun = time.monotonic()
    transformers_logging.disable_progress_bar()
    lock = _make_room()
    text, shape = OUT / "text", demo_model()
    with _part("1/5 text: documents of notes as long as each window, and a tokenizer of their words"):
        runs = {name: run_of([f"+stage={name}", "+scale=mini"]) for name in LAYOUTS}
        windows = {name: run.seq_length for name, run in runs.items()}
        trained = {run.seq_length: run.steps * run.global_batch_size for run in runs.values()}
        # half as many again as are read and held out: which ones are held out follows from their hashes
        documents = {
            w: int(1.5 * max(n / (1 - EVAL_FRACTION), EVAL_SEQUENCES / EVAL_FRACTION)) for w, n in trained.items()
        }
        window = shape.max_position_embeddings
        make_text(text, window, STEPS * BATCH * window, documents)
        data = {name: text / f"window-{windows[name]}" for name in LAYOUTS}
        print(f"{text}: {shape.vocab_size:,} tokens of vocabulary, windows of {', '.join(map(str, windows.values()))}")
    with _part("2/5 base model: a small Llama as a Hugging Face checkpoint"):
        base = make_base_model(text / f"window-{window}", text / "tokenizer", OUT / "base")
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
        _compare(OUT / "hf", stages[-1])
        answer = _generate(OUT / "hf", data["1048k"])
        print(answer)
    with _part("5/5 what came of it"):
        _report(stages, answer)
    print(f"\nmake demo: {time.monotonic() - begun:.0f} s. Everything is in {OUT.relative_to(ROOT)}/")
    lock.close()
    return EXIT_OK


def _make_room() -> IO[str]:
    """Remove what an earlier demo left, but for its text.

    Returns:
        the open lock file that keeps a second demo out; the kernel releases it when this process ends.

    Raises:
        UserError: another demo is at work in the folder.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    lock = (OUT / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"Another demo is at work in {OUT}. Wait for it to end.") from error
    for path in OUT.iterdir():
        if path.is_dir() and path.name != "text":
            shutil.rmtree(path)
        elif path.is_file() and path.name != ".lock":
            path.unlink()
    return lock


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
            *(f"+stage={name}", "+scale=mini", "model=demo", *sizes),
            *(f"{key}={path.relative_to(ROOT)}" for key, path in places.items()),
            *(f"data.eval_sequences={EVAL_SEQUENCES}", f"precision={PRECISION}", "evaluation.tasks=[recall]"),
            *(f"evaluation.samples={QUESTIONS}", f"evaluation.depths=[{','.join(map(str, DEPTHS))}]"),
            f"evaluation.haystack={(OUT / 'text' / 'haystack').relative_to(ROOT)}",
        ]
    )
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speeds = [RANKS * step["tokens_per_second_per_gpu"] for step in steps]
    config = from_yaml((run_dir / "config.yaml").read_text())
    return StageResult(config, read_evaluation(run_dir), statistics.median(speeds[1:] or speeds))


def _convert(run_dir: Path, out: Path) -> None:
    source, target = (str(p.relative_to(ROOT)) for p in (run_dir, out))
    _run(["python", "tools/convert.py", "megatron-to-hf", source, target])  # it writes the card too


def _compare(folder: Path, last: StageResult) -> None:
    """Measure the exported checkpoint with transformers alone, on the text that the last stage was measured on.

    Raises:
        RuntimeError: it is not the model that was trained.
    """
    assert last.config.data.path is not None
    assert last.evaluation.after is not None
    window = last.config.stage.seq_length
    dataset = SequenceDataset(ROOT / last.config.data.path, "eval")
    edges = bucket_edges(window)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums = torch.zeros(2, len(edges) - 1, dtype=torch.float64)
    alone: dict[str, Any] = {"dp_rank": 0, "dp_size": 1, "cp_rank": 0, "cp_size": 1}
    with torch.no_grad():
        for batch in evaluation_batches(Part(dataset), samples=EVAL_SEQUENCES, **alone):
            logits_SV = model(input_ids=batch["tokens"], use_cache=False).logits[0]
            losses_S = torch.nn.functional.cross_entropy(logits_SV, batch["labels"][0], reduction="none")
            sums += bucket_sums(losses_S, batch["loss_mask"][0], torch.arange(window), edges)
    found, trained = LossByPosition.from_sums(sums, edges).last_quarter, last.evaluation.after.last_quarter
    assert found is not None
    assert trained is not None
    print(f"loss on the last quarter of {window:,} tokens: {found:.4f} in transformers, {trained:.4f} in the trainer")
    if abs(found - trained) > TOLERANCE:
        raise RuntimeError(f"The export is not the trained model: losses {found} and {trained}.")


def _generate(folder: Path, data: Path) -> str:
    """What transformers writes behind held-out documents that end where a note is begun again, at its furthest."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dataset, eos, right, shown = SequenceDataset(data, "eval"), tokenizer.eos_token_id, 0, ""
    for document in range(ASKED):
        words = tokenizer.convert_ids_to_tokens(dataset.read(document, 0, dataset.seq_length).tolist())
        back, at = _furthest(words)
        prompt = torch.tensor([tokenizer.convert_tokens_to_ids(words[: at + 1])])
        written = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        text = tokenizer.decode(written[0, at + 1 :], skip_special_tokens=True)
        said, found = words[at - back + 1], text.split()[:1]
        right += found == [said]
        shown += f"  {back:5,} tokens back: {' '.join(words[at - 2 : at + 1])} ... {said} it said; {text!r} it writes\n"
    return f"notes begun again, each where its key was last heard of the longest ago:\n{shown}{right} of {ASKED} right"


def _furthest(words: list[str]) -> tuple[int, int]:
    """Tokens since its key last came up, and place, of the note for which these are most."""
    heard: dict[str, int] = {}
    back, at = 0, 0
    for i, word in enumerate(words):
        if word.endswith(":"):
            if (distance := i - heard.get(word, i)) > back:
                back, at = distance, i
            heard[word] = i
    return back, at


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
    found = [_all(stages, after=False), _all(stages, after=True)]
    titles = ["before each stage, under its theta", "after each stage"]
    (OUT / "recall.png").write_bytes(draw(found, "recall", titles))
    print(f"{'':65}{'loss, last quarter':^31}{'notes found':^15}  {'loss, 32 tokens':^15}")
    print(
        f"{'stage':6} {'window':>6} {'theta':>11} {'layout':>20} {'steps':>5} {'tokens/s':>9}   "
        f"{'before':>6} {'after':>6} {'change':>15}   {'before':>6} {'after':>6}   {'before':>6} {'after':>6}"
    )
    for row in rows:
        layout = str(Layout(**row["layout"]))
        print(
            f"{row['name']:6} {row['seq_length']:6,} {row['theta']:11,.0f} {layout:>20} {row['steps']:5} "
            f"{row['tokens_per_second']:9,.0f}   "
            f"{row['loss_last_quarter_before']:6.3f} {row['loss_last_quarter_after']:6.3f} "
            f"{row['loss_change']:+6.3f} +- {2 * row['loss_change_error']:.3f}    "
            f"{row['recall_before']:6.0%} {row['recall_after']:6.0%}   "
            f"{row['short_loss_before']:6.3f} {row['short_loss_after']:6.3f}"
        )
    print(f"tokens/s: all {RANKS} ranks, median over whole steps, data loading included; loss: nats, held-out text")
    print(f"+-: two standard errors over {EVAL_SEQUENCES} sequences in pairs; notes: hidden among others, chance 12%")
    print("summary.json, loss_by_position.png, recall.png; tensorboard --logdir outputs/demo")
    print(f"the model's card, made of what these runs wrote: {(OUT / 'hf' / CARD).relative_to(ROOT)}")


def _all(stages: list[StageResult], after: bool) -> Evaluation:
    """The questions of all stages as those of one model, for one heat map: each at its own window."""
    found = [stage.evaluation.asked_after if after else stage.evaluation.asked_before for stage in stages]
    cells = [cell for asked in found if asked is not None for cell in asked.cells]
    last = stages[-1].config.stage
    return Evaluation("all stages", last.seq_length, last.theta or 0.0, cells, None, None, None, None)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
