"""Convert, check and look at Llama checkpoints: Hugging Face, megatron-core, Meta's original layout and GGUF."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from megalong.checkpoint.checksums import CARD
from megalong.commands.options import outcome
from megalong.convert.compare import config_differences, logits_agreement, tensor_differences
from megalong.convert.dtypes import dtype_name
from megalong.convert.safetensors_plan import parse_size
from megalong.convert.to_gguf import hf_to_gguf, megatron_to_gguf
from megalong.convert.to_hf import megatron_to_hf, meta_to_hf
from megalong.convert.to_megatron import hf_to_megatron
from megalong.convert.weights import Weights, open_weights
from megalong.runtime.errors import EXIT_USER_ERROR, CheckpointError, UserError
from megalong.runtime.resident import peak_resident_bytes

app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Convert Llama checkpoints exactly, a few rows in memory at a time. Results are bit for bit; what is not "
        "understood is refused by name. A result gets its final name only when it is whole.\n\n"
        "Example: python tools/convert.py megatron-to-hf runs/1048k Llama-3-8B-1048k"
    ),
)

Dtype = Annotated[str | None, typer.Option(help="Cast to float32, bfloat16 or float16. Without it: no bit changes.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it is what a conversion wrote, and nothing besides.")
]
ShardSize = Annotated[str, typer.Option(help="Largest *.safetensors file, such as 5GB or 500MiB.")]


@app.command("hf-to-megatron")
def hf_to_megatron_command(
    hf_dir: Annotated[Path, typer.Argument(help="Directory with config.json and *.safetensors.")],
    out: Annotated[
        Path, typer.Argument(help="megatron-core checkpoint to make; a training run takes it as init_from.")
    ],
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Hugging Face to megatron-core (torch_dist): loads at any TP, PP, CP, DP and in either layer spec.

    Example: python tools/convert.py hf-to-megatron Meta-Llama-3-8B checkpoints/llama3-8b
    """
    with _report(out) as progress:
        hf_to_megatron(hf_dir, out, dtype, overwrite, progress)


@app.command("megatron-to-hf")
def megatron_to_hf_command(
    ckpt: Annotated[Path, typer.Argument(help="megatron-core checkpoint, or the run_dir of a training run.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to make.")],
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    card: Annotated[bool, typer.Option(help="Write the model's card, README.md, if CKPT is a run_dir.")] = True,
) -> None:
    """megatron-core to Hugging Face: sharded safetensors, config.json with the stage's theta and window in both
    spellings, tokenizer and generation config carried over, and a card; the optimizer is left out.

    Example: python tools/convert.py megatron-to-hf runs/1048k Llama-3-8B-1048k
    """
    with _report(out) as progress:
        texts = _card(ckpt, out.name) if card else {}
        megatron_to_hf(ckpt, out, parse_size(max_shard_size), dtype, overwrite, progress, texts)
    if texts:
        print(f"model card: {out / CARD}")


@app.command("from-meta")
def from_meta_command(
    meta_dir: Annotated[Path, typer.Argument(help="Directory with params.json and consolidated.*.pth.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face directory to make.")],
    window: Annotated[
        int | None, typer.Option(help="max_position_embeddings, which Llama 1 and 2 do not state.")
    ] = None,
    rope_factor: Annotated[float | None, typer.Option(help="Factor of the rope scaling: 8 (3.1) or 32 (3.2).")] = None,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    overwrite: Overwrite = False,
) -> None:
    """Meta's original layout, one or several model-parallel files, to Hugging Face, with the rotary permutation.

    Example: python tools/convert.py from-meta Meta-Llama-3-8B/original Llama-3-8B-hf
    """
    with _report(out) as progress:
        meta_to_hf(meta_dir, out, window, rope_factor, parse_size(max_shard_size), dtype, overwrite, progress)


GgufType = Annotated[
    str | None,
    typer.Option("--type", help="f32, bf16, f16, q8_0, q5_1, q5_0, q4_1 or q4_0. Without it: matrices as they are."),
]


@app.command("megatron-to-gguf")
def megatron_to_gguf_command(
    ckpt: Annotated[Path, typer.Argument(help="megatron-core checkpoint, or the run_dir of a training run.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to make.")],
    kind: GgufType = None,
    overwrite: Overwrite = False,
) -> None:
    """megatron-core to GGUF, the file that llama.cpp reads: weights, theta and window, rope scaling, tokenizer.

    Example: python tools/convert.py megatron-to-gguf runs/1048k Llama-3-8B-1048k-q8_0.gguf --type q8_0
    """
    with _report(out) as progress:
        text = _card(ckpt, out.name.removesuffix(".gguf")).get(CARD)
        megatron_to_gguf(ckpt, out, kind, text.decode() if text else None, overwrite, progress)


@app.command("hf-to-gguf")
def hf_to_gguf_command(
    hf_dir: Annotated[Path, typer.Argument(help="Directory with config.json, *.safetensors and the tokenizer.")],
    out: Annotated[Path, typer.Argument(help="GGUF file to make.")],
    kind: GgufType = None,
    overwrite: Overwrite = False,
) -> None:
    """Hugging Face to GGUF, as megatron-to-gguf; what README.md says in front (licence, base model) is taken along.

    Example: python tools/convert.py hf-to-gguf Llama-3-8B-1048k Llama-3-8B-1048k.gguf
    """
    with _report(out) as progress:
        hf_to_gguf(hf_dir, out, kind, overwrite, progress)


@app.command()
def verify(
    a: Annotated[Path, typer.Argument(help="Hugging Face directory, megatron-core checkpoint or run_dir.")],
    b: Annotated[Path, typer.Argument(help="The other one.")],
    logits: Annotated[bool, typer.Option(help="Compare fp32 logits too, near and far in the window.")] = True,
    tolerance: Annotated[float, typer.Option(help="Largest relative difference of logits.")] = 1e-5,
) -> None:
    """Say whether two directories hold the same model: configs, names, shapes, dtypes, every bit, then logits.

    Exit code 0 only if they do.

    Example: python tools/convert.py verify Meta-Llama-3-8B checkpoints/llama3-8b
    """
    with _errors(), open_weights(a) as first, open_weights(b) as second:
        config = config_differences(first, second)
        for line in config:
            print(f"config     {line}")
        with _bar(_nbytes(first), "comparing") as add:
            odd: dict[str, int] = {}
            found = list(tensor_differences(first, second, add, odd))
        for difference in found:
            print(f"tensor     {difference.name}: {difference.what}")
        if not found:
            print(f"tensors    {len(first.tensors)} of {len(first.tensors)} equal in name, shape, dtype and every bit")
        for name, count in odd.items():
            print(f"tensor     {name}: {count:,} values are NaN or infinite in the first")
        agreed = True
        comparable = logits and not any("shape" in d.what or "only in" in d.what for d in found)
        for result in logits_agreement(first, second) if comparable else []:
            agreed &= result.relative <= tolerance and result.argmax == 1.0
            print(
                f"logits     {result.where}: max abs {result.max_abs:.3g}, relative {result.relative:.3g}, same argmax "
                f"{result.argmax:.1%}{f', {result.odd:,} NaN or infinite' if result.odd else ''}"
            )
        if config or found or not agreed:
            raise CheckpointError(f"{a} and {b} do not hold the same model.")
        print(f"{a} and {b} hold the same model.")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Hugging Face directory, megatron-core checkpoint or run_dir.")],
    check: Annotated[bool, typer.Option(help="Read all files and compare their checksums.")] = True,
) -> None:
    """Say what a directory is: kind, parameters, dtype, theta and window, stage, size, checksums.

    Example: python tools/convert.py inspect runs/1048k
    """
    with _errors(), open_weights(path) as weights:
        model = weights.model
        rope = model.rope_scaling["rope_type"] if model.rope_scaling else "default"
        dtypes = sorted({dtype_name(fact.dtype) for fact in weights.tensors.values()})
        rows = {
            "kind": f"{weights.kind}, {weights.folder}",
            "parameters": f"{_values(weights):,} in {len(weights.tensors)} tensors",
            "dtype": ", ".join(dtypes),
            "shape": (
                f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, MLP {model.intermediate_size}, heads "
                f"{model.num_attention_heads} / {model.num_key_value_heads} of {model.head_dim}, vocabulary "
                f"{model.vocab_size}{', tied' if model.tie_word_embeddings else ''}"
            ),
            "theta": f"{model.rope_theta:.17g} ({rope})",
            "window": f"{model.max_position_embeddings:,} tokens",
            **{name: str(value) for name, value in weights.extra().items()},
            "size": f"{weights.size() / 1e6:,.1f} MB",
        }
        for name, text in rows.items():
            print(f"{name:<18} {text}")
        print(f"{'checksums':<18} {weights.check_files() if check else 'not checked'}")


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Hugging Face directory, megatron-core checkpoint or run_dir.")],
    b: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """Say where two directories differ: config keys, and per tensor the first place and the norms.

    Exit code 1 if they differ, as diff(1) has it.

    Example: python tools/convert.py diff runs/65k runs/262k
    """
    differs = False
    with _errors(), open_weights(a) as first, open_weights(b) as second:
        for line in config_differences(first, second):
            differs = True
            print(f"config     {line}")
        with _bar(_nbytes(first), "comparing") as add:
            for difference in tensor_differences(first, second, add):
                differs = True
                tqdm.write(f"tensor     {difference.name}: {difference.what}")
    print("they differ" if differs else "no difference")
    raise typer.Exit(1 if differs else 0)


def _card(path: Path, name: str) -> dict[str, bytes]:
    """The card that goes along with a run's export."""
    from megalong.card.card import card_of_run  # draws pictures: a second that other commands need not wait

    return card_of_run(path, name)


@contextmanager
def _errors() -> Iterator[None]:
    """A user's mistake ends as one message and exit code 2."""
    try:
        yield
    except UserError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_USER_ERROR) from error


@contextmanager
def _report(out: Path) -> Iterator[Callable[[int, int], None]]:
    """Progress in bytes, then one line on time and memory."""
    begun, bars = time.monotonic(), list[tqdm]()

    def progress(count: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, desc="writing"))
        bars[0].update(min(count, total - bars[0].n))  # headers and records come on top of the tensors

    try:
        with _errors():
            yield progress
    finally:
        for bar in bars:
            bar.close()
    seconds = time.monotonic() - begun
    size = sum(path.stat().st_size for path in (out, *out.rglob("*")) if path.is_file())
    peak = peak_resident_bytes() / 2**20
    print(f"{out}: {size / 1e6:,.1f} MB in {seconds:.1f} s, peak resident memory {peak:,.0f} MiB")


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[int], None]]:
    with tqdm(total=total, unit="B", unit_scale=True, desc=what) as bar:

        def add(count: int) -> None:
            bar.update(count)

        yield add


def _values(weights: Weights) -> int:
    return sum(math.prod(fact.shape) for fact in weights.tensors.values())


def _nbytes(weights: Weights) -> int:
    return _values(weights) * next(iter(weights.tensors.values())).dtype.itemsize


def command() -> int:
    """`megalong-convert`; exit code."""
    return outcome(app, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(command())
