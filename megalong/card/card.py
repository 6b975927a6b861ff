"""How does a model card come about? README.md with front matter for Hugging Face, and pictures, from what runs wrote.

The training table has the rows of the Llama-3-8B-Instruct-Gradient-1048k card.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from megalong.card import in_run
from megalong.card.lineage import Lineage, Stage, lineage
from megalong.card.scores import Scores, read_scores
from megalong.card.usage import usage
from megalong.checkpoint.checksums import CARD
from megalong.checkpoint.info import HF_FILES
from megalong.checkpoint.pointer import RUN_CONFIG
from megalong.convert.hf_folder import read_carried
from megalong.convert.table import hf_shapes
from megalong.evaluation.heatmap import draw, table
from megalong.evaluation.plots import plot_loss_by_position
from megalong.evaluation.position import LossByPosition
from megalong.model.llama import model_from_hf

LOSS, NEEDLE = "images/loss_by_position.png", "images/needle.png"
_FRONT_KEYS = ("license", "license_name", "license_link", "language")


def make_card(run_dir: Path, name: str | None = None, evaluation: Path | None = None) -> dict[str, bytes]:
    """The card of the model that a run has trained, and the pictures that it shows.

    Args:
        run_dir: of the last stage.
        name: how the model is called; None: as the base's folder and the last stage are.
        evaluation: what tools/evaluate.py wrote; None: looked for in run_dir/evaluation.

    Returns:
        file name -> content.

    Raises:
        CheckpointError: it is no run_dir, or has no whole checkpoint.
        DataError: `evaluation` is none.
    """
    chain = lineage(run_dir)
    last = chain.stages[-1]
    name = name or f"{chain.base.name or last.config.model.name}-{last.name}"
    scores = read_scores(run_dir, evaluation, last.info.seq_length, last.info.theta, chain.missing)
    files: dict[str, bytes] = {}
    curves = {f"{s.name}: {s.info.seq_length:,} tokens": s.evaluation for s in chain.stages if s.evaluation}
    if curves:
        picture = io.BytesIO()
        plot_loss_by_position(curves, picture, "Loss by position before and after each stage")
        files[LOSS] = picture.getvalue()
    if scores and any(c.task == "needle" and c.depth is not None for e in scores.checkpoints for c in e.cells):
        files[NEEDLE] = draw([e for e in scores.checkpoints if any(c.task == "needle" for c in e.cells)])
    own = None if scores else in_run.picture(last)
    if own:
        files[NEEDLE] = own[1]
    found = _found(scores, files) if scores else _found_in_runs(chain, own[0] if own else None)
    text = "\n\n".join(
        part
        for part in (
            f"---\n{_front(chain, name).to_yaml()}\n---",
            f"# {name}\n\n{_summary(chain)}",
            f"## Progressive training\n\n{_training(chain)}",
            f"## Compute\n\n{_compute(chain)}",
            f"## Loss by position\n\n{_positions(chain, files)}",
            f"## What it finds in its window\n\n{found}",
            f"## Data\n\n{_data(chain)}",
            f"## How to use it\n\n{_usage(chain, name)}",
            f"## Versions\n\n{_versions(chain)}",
            f"## Limits\n\n{_limits(chain, scores)}",
        )
    )
    return {CARD: (text + "\n").encode(), **files}


def card_of_run(path: Path, name: str) -> dict[str, bytes]:
    """The card that goes along with an export; none if `path` is no run_dir."""
    return make_card(path, name) if (path / RUN_CONFIG).is_file() and (path / "checkpoints").is_dir() else {}


def _front(chain: Lineage, name: str) -> ModelCardData:
    front = chain.base.front
    known = {key: front[key] for key in _FRONT_KEYS if front.get(key)}
    if chain.base.repository:
        known["base_model"] = chain.base.repository
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "long-context", "megalong"],
        **known,
    )


def _summary(chain: Lineage) -> str:
    last = chain.stages[-1]
    shape = model_from_hf(last.info.hf_config)
    count = sum(math.prod(size) for size in hf_shapes(shape).values())
    stages = " -> ".join(stage.name for stage in chain.stages)
    scale = last.config.scale.name
    text = (
        f"A Llama of {count:,} parameters with a window of {last.info.seq_length:,} tokens and a RoPE theta of "
        f"{last.info.theta:,.0f}, trained from {chain.base.words} in {len(chain.stages)} "
        f"stage{'s' if len(chain.stages) > 1 else ''} ({stages}) on {sum(s.tokens for s in chain.stages):,} tokens."
    )
    if scale != "full":
        text += f" Trained at the scale `{scale}`: a small model for trying things out."
    if not last.is_finished:
        text += f" **The stage is not finished: this is step {last.info.step} of {last.config.train.steps}.**"
    return text


def _training(chain: Lineage) -> str:
    stages = chain.stages
    before = [f"{chain.base.words}", *(stage.name for stage in stages)]
    rows: list[tuple[str, Callable[[Stage], str]]] = [
        ("Initialize from", lambda s: before[stages.index(s)]),
        ("Sequence length 2^N", lambda s: f"{math.log2(s.info.seq_length):.4g}"),
        ("Sequence length", lambda s: f"{s.info.seq_length:,}"),
        ("RoPE theta", lambda s: f"{s.info.theta:,.0f}"),
        ("Batch size", lambda s: _or(s.config.topology.dp, "{:,}")),
        ("Gradient accumulation steps", _accumulation),
        ("Steps", lambda s: f"{s.info.step:,}"),
        ("Total tokens", lambda s: f"{s.tokens:,}"),
        ("Learning rate", lambda s: _or(s.config.train.lr, "{:.2e}")),
        ("# GPUs", lambda s: _or(s.ranks, "{:,}")),
        ("GPU type", lambda s: s.config.cluster.gpu),
        ("Layout", _layout),
        ("Minutes to train (wall)", lambda s: "missing" if s.seconds is None else _short(s.seconds / 60)),
        ("Tokens/s/GPU", _speed),
        ("Loss, last quarter: before", lambda s: _loss(s.evaluation.before if s.evaluation else None)),
        ("Loss, last quarter: after", lambda s: _loss(s.evaluation.after if s.evaluation else None)),
    ]
    lines = [_row(["", *(stage.name for stage in stages)]), _row(["---"] * (len(stages) + 1))]
    lines += [_row([title, *(value(stage) for stage in stages)]) for title, value in rows]
    return "\n".join(lines) + (
        "\n\nWall minutes: all steps, data loading included, as measured on the first rank; start-up, saves and "
        "evaluation come on top, and steps that were lost and done again are counted once. Losses: nats per token on "
        "held-out text."
    )


def _compute(chain: Lineage) -> str:
    unit = "GPU" if all(s.config.cluster.device == "cuda" for s in chain.stages) else "rank"
    hours = {stage.name: stage.device_hours for stage in chain.stages}
    known = [h for h in hours.values() if h is not None]
    lines = [f"- {name}: {_short(h)} {unit} hours (measured)" for name, h in hours.items() if h is not None]
    lines += [f"- {name}: {unit} hours are missing" for name, h in hours.items() if h is None]
    if len(known) == len(hours):
        lines.append(f"- all stages: {_short(sum(known))} {unit} hours (measured: steps, first rank's clock)")
    lines.append("- energy: not measured")
    return "\n".join(lines)


def _positions(chain: Lineage, files: dict[str, bytes]) -> str:
    if LOSS not in files:
        return "Missing: no stage was evaluated."
    return f"![loss by position before and after each stage]({LOSS})\n\nHeld-out text of each stage's own data."


def _found(scores: Scores, files: dict[str, bytes]) -> str:
    parts = [f"![needles by depth and length]({NEEDLE})"] if NEEDLE in files else ["Missing: no needles were asked."]
    parts.append(f"```\n{table(scores.checkpoints, scores.base)}\n```")
    if scores.base is None or scores.base.short_loss is None:
        parts.append("Missing: the loss on short documents beside the base's (`tools/evaluate.py --base`).")
    return "\n\n".join(parts)


def _found_in_runs(chain: Lineage, drawn: str | None) -> str:
    """What the runs asked of the model, where nobody has asked it since."""
    if not in_run.is_known(chain.stages):
        return "Missing: `tools/evaluate.py` was not run on it, so nothing is known of needles and of short contexts."
    head, *rest = in_run.rows(chain.stages)
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rest)]
    parts = [
        "Asked by the runs themselves: the share of answers that greedy decoding would write, and the loss on each "
        "stage's own held-out text cut to the base's window. `tools/evaluate.py` was not run on it.",
        "\n".join(lines),
    ]
    if drawn:
        parts.insert(0, f"![{drawn}: answers found by depth and length]({NEEDLE})")
    else:
        parts.append("Missing: the last stage asked for nothing that lies at a depth.")
    if chain.stages[-1].evaluation is None or in_run.harm(chain.stages[-1].evaluation) is None:
        parts.append("Missing: the harm to short contexts.")
    return "\n\n".join(parts)


def _data(chain: Lineage) -> str:
    lines = [_row(["", "source", "sequences", "held out", "tokenizer", "manifest.json, SHA-256"]), _row(["---"] * 6)]
    for stage in chain.stages:
        made = stage.manifest
        if made is None:
            lines.append(_row([stage.name, "missing", "", "", "", ""]))
            continue
        count = [f"{made.sequences(split):,}" for split in ("train", "eval")]
        lines.append(_row([stage.name, made.source, *count, made.tokenizer.name, f"`{stage.manifest_sha256}`"]))
    recipes = [(s.name, s.manifest.made) for s in chain.stages if s.manifest and s.manifest.made]
    for name, recipe in recipes:
        text = json.dumps(recipe, indent=1, ensure_ascii=False)
        lines.append(f"\n<details><summary>How the data of {name} was made</summary>\n")
        lines.append(f"```json\n{text}\n```\n\n</details>")
    return "\n".join(lines)


def _versions(chain: Lineage) -> str:
    names = list(dict.fromkeys(name for stage in chain.stages for name in stage.info.versions))
    lines = [_row(["", *(s.name for s in chain.stages)]), _row(["---"] * (len(chain.stages) + 1))]
    lines += [_row([name, *(s.info.versions.get(name, "not recorded") for s in chain.stages)]) for name in names]
    lines.append(_row(["checkpoint", *(f"`{s.checkpoint}`" for s in chain.stages)]))
    lines.append(_row(["seed", *(str(s.config.seed) for s in chain.stages)]))
    lines.append(_row(["precision", *(s.config.precision for s in chain.stages)]))
    return "\n".join(lines)


def _limits(chain: Lineage, scores: Scores | None) -> str:
    last = chain.stages[-1]
    lines = [
        f"- Trained for a window of {last.info.seq_length:,} tokens; nothing beyond it was looked at.",
        "- Lengthening a window teaches no facts: what the base can and cannot do, and its biases, are still there. "
        "Its safety was not looked at.",
    ]
    if scores is None and not in_run.is_known(chain.stages):
        lines.append("- What it finds in its window was not measured.")
    return "\n".join([*lines, *(f"- Missing. {words}" for words in chain.missing)])


def _usage(chain: Lineage, name: str) -> str:
    last = chain.stages[-1]
    files = read_carried(last.run_dir / "checkpoints" / last.checkpoint / HF_FILES)
    if not {"tokenizer.json", "tokenizer.model"} & files.keys():
        chain.missing.append("The tokenizer: the checkpoint carries none.")
        return "Missing: the checkpoint carries no tokenizer, so the model has to be given one first."
    has_chat = "chat_template.jinja" in files or b'"chat_template"' in files.get("tokenizer_config.json", b"")
    return usage(name, has_chat, last.info.seq_length)


def _accumulation(stage: Stage) -> str:
    batch, dp = stage.config.train.global_batch_size, stage.config.topology.dp
    return _or(batch // dp if batch and dp else None, "{:,}")


def _layout(stage: Stage) -> str:
    sizes = stage.config.topology
    return f"tp={sizes.tp} cp={sizes.cp} pp={sizes.pp} dp={sizes.dp}"


def _speed(stage: Stage) -> str:
    if stage.seconds is None or not stage.ranks:
        return "missing"
    return f"{stage.tokens / stage.seconds / stage.ranks:,.0f}"


def _loss(curve: LossByPosition | None) -> str:
    return _or(curve.last_quarter if curve else None, "{:.4f}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _or(value: float | None, form: str) -> str:
    return "missing" if value is None else form.format(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
