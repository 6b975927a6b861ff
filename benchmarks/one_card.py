"""What does one card make of Llama-3-8B's layers at long windows? For GPUs; small sizes walk the script on a CPU.

    python benchmarks/one_card.py share                                    # one rank's share of a 1048k sequence on 32
    python benchmarks/one_card.py transformers --tokens 131072 --layers 4  # beside transformers with SDPA
    python benchmarks/one_card.py share transformers --small               # a CPU: only to try the script

share         seconds of a layer of one rank, forward and backward with full recompute, as parts that are each measured:
              a real step's layers at the local window, less their own attention, plus the compute of a ring of 32.
transformers  forward and backward at the same shapes, tokens and recompute: transformers' LlamaForCausalLM with SDPA
              and gradient checkpointing against our model; no optimizer step on either side. Its loss is computed in
              the same pieces of tokens, since logits of 128k tokens would not fit. The whole model: --layers 32.

TFLOP/s are model FLOPs: causal attention, no recompute. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import megalong
from megalong.config.cluster import card
from megalong.doctor.ranks import run_on_ranks
from megalong.doctor.ring_speed import BACKWARD_FLOPS, ring_compute
from megalong.doctor.steps import Trainer
from megalong.model.flops import model_flops_per_step
from megalong.runtime import device, launch

RING = 32
WANTED = {"share": 450.0, "transformers": 1.25}
CHUNK = 1024


def settings(tokens: int, layers: int, small: bool) -> list[str]:
    """One sequence of `tokens` on this one rank."""
    one = [*(f"topology.{axis}=1" for axis in ("tp", "cp", "pp", "dp")), "train.global_batch_size=1"]
    if small:  # the scale divides windows by 256
        base = ["+stage=65k", "+scale=mini", f"stage.seq_length={tokens * 256}"]
    else:
        base = ["+stage=65k", f"stage.seq_length={tokens}", "cluster=auto", "stage.theta=null"]
    return [*base, f"model.num_hidden_layers={layers}", f"train.loss_chunk={CHUNK}", "train.recompute=full", *one]


def fastest(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the best of several attempts after one that is not counted."""
    found = []
    for attempt in range(repeats + 1):
        device.synchronize()
        begun = time.perf_counter()
        work()
        device.synchronize()
        if attempt:
            found.append(time.perf_counter() - begun)
    return min(found)


def passes(tokens: int, layers: int, small: bool, repeats: int) -> tuple[float, Trainer]:
    """Seconds of forward and backward of our model, and the model."""
    from megatron.core import parallel_state

    from megalong.training.forward import forward_backward

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    trainer = Trainer([], run_on_ranks(settings(tokens, layers, small)))
    seconds = fastest(lambda: forward_backward(tokens, trainer.model, trainer.batches(), 1), repeats)
    return seconds, trainer


def share(tokens: int, layers: int, small: bool, repeats: int) -> dict[str, Any]:
    """A layer of one rank of a ring of 32 at `tokens` local tokens."""
    few, trainer = passes(tokens, layers, small, repeats)
    model, dtype = trainer.run.model, torch.bfloat16
    del trainer
    many, trainer = passes(tokens, 2 * layers, small, repeats)
    del trainer
    layer = (many - few) / layers
    name = "cpu_flash" if small else "cudnn" if torch.cuda.get_device_capability()[0] == 9 else "cuda_flash"
    shape = (tokens, model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    here = torch.device("cpu" if small else "cuda")
    ring = ring_compute(RING, shape, dtype, here, name, repeats)
    pairs = tokens * (tokens * RING + 1) / 2
    flop = 4.0 * pairs * model.num_attention_heads * model.head_dim
    # recompute runs forward twice
    ring_s = 2 * flop / (ring["forward_tflops"] * 1e12) + BACKWARD_FLOPS * flop / (ring["backward_tflops"] * 1e12)
    own = own_attention(shape, dtype, here, name, repeats)
    total = layer - own + ring_s
    one_layer = replace(model, num_hidden_layers=1)
    whole = model_flops_per_step(one_layer, tokens * RING, 1) - model_flops_per_step(
        replace(model, num_hidden_layers=0), tokens * RING, 1
    )
    return {
        "local_tokens": tokens,
        "kernel": name,
        "layer_s": layer,
        "own_attention_s": own,
        "ring_s": ring_s,
        "share_of_a_layer_s": total,
        "model_tflops": whole / RING / total / 1e12,
        "wanted": {"model_tflops": WANTED["share"]},
    }


def own_attention(
    shape: tuple[int, int, int, int], dtype: torch.dtype, here: torch.device, name: str, repeats: int
) -> float:
    """Seconds that attention over the local tokens alone takes in a layer with full recompute."""
    from megalong.attention import kernels
    from megalong.attention.kernel import Attended

    tokens, heads, kv_heads, head_dim = shape
    kernel = kernels.select(name, here, dtype, head_dim, head_dim**-0.5)
    q, dout = (torch.randn(1, heads, tokens, head_dim, device=here).to(dtype) for _ in "qd")
    k, v = (torch.randn(1, kv_heads, tokens, head_dim, device=here).to(dtype) for _ in "kv")
    out, lse = kernel.forward(q, k, v, True)
    forward = fastest(lambda: kernel.forward(q, k, v, True), repeats)
    return 2 * forward + fastest(lambda: kernel.backward(dout, Attended(q, k, v, out, lse), True), repeats)


def transformers(tokens: int, layers: int, small: bool, repeats: int) -> dict[str, Any]:
    """Our forward and backward against transformers' with SDPA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours, trainer = passes(tokens, layers, small, repeats)
    model = trainer.run.model
    flops = model_flops_per_step(model, tokens, 1)
    del trainer
    torch.cuda.empty_cache()
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_position_embeddings=tokens,
        use_cache=False,
        attn_implementation="sdpa",
    )
    here = torch.device("cpu" if small else "cuda")
    theirs = LlamaForCausalLM(config).to(here, torch.bfloat16).train()
    theirs.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    words = torch.randint(0, model.vocab_size, (1, tokens), device=here)

    def step() -> None:
        theirs.zero_grad(set_to_none=True)
        hidden = theirs.model(input_ids=words).last_hidden_state
        leaf = hidden.detach().requires_grad_()
        for start in range(0, tokens, CHUNK):
            piece = slice(start, start + CHUNK)
            logits = theirs.lm_head(leaf[:, piece]).float()
            (torch.nn.functional.cross_entropy(logits[0], words[0, piece], reduction="sum") / tokens).backward()
        hidden.backward(leaf.grad)

    other = fastest(step, repeats)
    return {
        "tokens": tokens,
        "layers": layers,
        "ours_s": ours,
        "transformers_s": other,
        "times_faster": other / ours,
        "ours_model_tflops": flops / ours / 1e12,
        "transformers_model_tflops": flops / other / 1e12,
        "wanted": {"times_faster": WANTED["transformers"]},
    }


ROWS = {"share": (share, 32768, 2), "transformers": (transformers, 131072, 4)}


def main(process: launch.Process) -> int:
    """Measure the rows that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which rows; none: all")
    parser.add_argument("--tokens", type=int, help="instead of 32,768 local tokens, and 131,072")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="the small model on a CPU: only to try the script")
    given = parser.parse_args()
    if not given.small and not torch.cuda.is_available():
        print(json.dumps({"open": "no GPU on this machine"}))
        return 0
    device.install()
    launch.init_process_group(process, timeout_s=3600)
    name = torch.cuda.get_device_name() if not given.small else "CPU"
    found: dict[str, Any] = {"device": card(name), "torch": torch.__version__, "megalong": megalong.__version__}
    for row in given.rows or ROWS:
        fn, tokens, layers = ROWS[row]
        tokens, layers = (
            given.tokens or (256 if given.small else tokens),
            given.layers or (1 if given.small else layers),
        )
        found[row] = fn(tokens, layers, given.small, given.repeats)
        print(f"{row}: {json.dumps(found[row])}", flush=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(launch.run(main))
