"""What do whole training steps come to, by transformers and torch's AdamW on one process, and by the real trainer?

The trainer goes its whole way: a Hugging Face base with a theta and window of its own, the stage's theta by the law, a
data folder, `StageRun`, metrics.jsonl, evaluation.json. The other side shares the files with it and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from megatron.core import parallel_state
from torch import Tensor

from megalong.checkpoint.optimizer_shards import part_of, spreads
from megalong.data.builder import build
from megalong.data.dataset import SequenceDataset
from megalong.data.manifest import TokenizerInfo
from megalong.data.order import epoch_order
from megalong.training.gradients import full_gradients
from megalong.training.loop import StageRun
from tests.training.parity import SHAPE, VOCABULARY, WINDOW, hf_model
from tests.training.runs import metrics, stage_run

BASE_WINDOW, BASE_THETA = 32, 10000.0
EOS, SEED = 0, 7
STEPS, BATCH, EVALUATED = 3, 4, 3
PEAK, WARMUP, CLIP, BETAS, EPS, DECAY = 4e-3, 2, 1.0, (0.8, 0.9), 1e-3, 0.1
RATES = (PEAK / 3, PEAK * 2 / 3, PEAK)
MODEL = SHAPE | {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": BASE_WINDOW}


@dataclass
class Steps:
    """What a few steps came to."""

    metrics: list[dict[str, float]]
    """loss, grad_norm (before clipping), lr, tokens, valid_tokens of each step."""
    weights: dict[str, Tensor]
    """Master weights after the last step, whole, fp32, by Hugging Face name."""
    evaluation: dict[str, list[float]] = field(default_factory=dict)
    """before, after: mean loss of the held-out tokens by position."""


def stage_theta() -> float:
    """Theta of the stage by the published law of the recipe (factor 4)."""
    d = MODEL["head_dim"]
    return float(int(BASE_THETA * (4 * WINDOW / BASE_WINDOW - 3) ** (d / (d - 2))))


def make_base(folder: Path) -> None:
    """A Llama with biases and random norms; its weights are bf16 numbers, so that fp32 and bf16 runs start equal."""
    rope = {"rope_type": "default", "rope_theta": BASE_THETA}
    model = hf_model(**MODEL, rope_parameters=rope, eos_token_id=EOS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)


def make_data(folder: Path, window: int = WINDOW) -> None:
    """Many short documents, in fewer sequences than the steps take; the last one of each split is padded."""
    random = np.random.default_rng(0)

    def documents(tokens: int, held_out: bool) -> list[tuple[bool, np.ndarray]]:
        found = []
        while tokens > 0:
            length = min(tokens, int(random.integers(5, 60)))
            ids = random.integers(1, VOCABULARY, length, dtype=np.int32)
            ids[-1] = EOS
            found.append((held_out, ids))
            tokens -= length
        return found

    info = TokenizerInfo(name="random", sha256="0" * 64, vocab_size=VOCABULARY, eos_token_id=EOS)
    texts = documents(int(6.6 * WINDOW), False) + documents(int(4.4 * WINDOW), True)
    build(texts, folder, tokenizer=info, seq_length=window, source="random numbers")


# The trainer ---------------------------------------------------------------------------------------------------


def settings(base: Path, data: Path) -> list[str]:
    """Overrides of the run, but for its layout, precision and document mask."""
    shape = {**MODEL, "rope_theta": BASE_THETA, "eos_token_id": EOS}
    return [
        f"init_from={base}",
        f"data.path={data}",
        f"data.eval_sequences={EVALUATED}",
        "data.max_passes=99",  # few sequences, read again and again
        f"stage.seq_length={WINDOW * 256}",
        f"train.steps={STEPS}",
        f"train.global_batch_size={BATCH}",
        f"train.lr={PEAK}",
        "train.loss_chunk=24",
        f"optimizer.warmup_steps={WARMUP}",
        f"optimizer.clip_grad={CLIP}",
        f"optimizer.adam_beta1={BETAS[0]}",
        f"optimizer.adam_beta2={BETAS[1]}",
        f"optimizer.adam_eps={EPS}",
        f"optimizer.weight_decay={DECAY}",
        f"seed={SEED}",
        *(f"model.{name}={value}" for name, value in shape.items()),
    ]


def trained(folder: str, name: str, kinds: list[tuple[str, str]], overrides: list[str]) -> dict[tuple[str, str], Steps]:
    """On every rank: one run for each (precision, document mask); weights on rank 0 only."""
    found = {}
    for precision, documents in kinds:
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        run_dir = Path(folder) / f"{name}-{precision}-{documents}"
        kind = [f"precision={precision}", f"attention.document_mask={documents}"]
        stage = stage_run(str(run_dir), *settings(Path(folder) / "base", Path(folder) / "data"), *kind, *overrides)
        assert stage.run() == 0
        evaluation = json.loads((run_dir / "evaluation.json").read_text())
        by_position = {when: evaluation[when]["loss"] for when in ("before", "after")}
        found[precision, documents] = Steps(metrics(run_dir), full_weights(stage), by_position)
    return found


def full_weights(stage: StageRun) -> dict[str, Tensor]:
    """The optimizer's master weights as `full_gradients` gathers gradients: they are put in their place."""
    part = part_of(stage.state.optimizer)
    rank = part.data_parallel_group.rank()
    for spread in spreads(part):
        piece = spread.of(rank)
        if piece is not None:
            master = part._get_main_param_and_optimizer_states(spread.parameter)["param"]
            spread.parameter.main_grad.view(-1)[piece.start : piece.end] = master.detach().float().view(-1)
    return full_gradients(stage.settings, stage.state.model)


# transformers --------------------------------------------------------------------------------------------------


def rates_of(decay: str, steps: int, **settings: Any) -> list[float]:
    """Learning rates of a run by torch's and transformers' schedules.

    Args:
        decay: optimizer.decay.
        settings: min_lr; wsd_steps and wsd_shape for wsd; peak and warmup where they are others than PEAK and WARMUP.
    """
    peak, warmup = settings.get("peak", PEAK), settings.get("warmup", WARMUP)
    low = settings.get("min_lr", 0.0)
    adam = torch.optim.SGD([torch.zeros(1)], lr=peak)
    rising = torch.optim.lr_scheduler.LinearLR(adam, 1 / (warmup + 1), 1.0, max(1, warmup))
    after: Any
    if decay == "constant":
        after = torch.optim.lr_scheduler.ConstantLR(adam, 1.0)
    elif decay == "linear":
        after = torch.optim.lr_scheduler.LinearLR(adam, 1.0, low / peak, steps - warmup)
    elif decay == "cosine":
        after = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps - warmup, low)
    else:
        shape = {"minus_sqrt": "1-sqrt"}.get(settings["wsd_shape"], settings["wsd_shape"])
        after = transformers.get_wsd_schedule(
            adam, 0, settings["wsd_steps"], steps - warmup, decay_type=shape, min_lr_ratio=low / peak
        )
    schedule = torch.optim.lr_scheduler.SequentialLR(adam, [rising, after], [warmup]) if warmup else after
    rates = []
    for _ in range(steps):
        rates.append(float(adam.param_groups[0]["lr"]))
        adam.step()
        schedule.step()
    return rates


class Reference:
    """The same steps by transformers in fp32; for bf16, at master weights rounded to bf16, as mixed precision does.

    Args:
        rates: learning rate of each step.
    """

    def __init__(self, folder: Path, precision: str, documents: str, rates: Sequence[float] = RATES) -> None:
        self.rates = rates
        self.rounded, self.documents, self.data = precision == "bf16", documents, folder / "data"
        config = transformers.LlamaConfig.from_pretrained(folder / "base")
        config.rope_parameters = {"rope_type": "default", "rope_theta": stage_theta()}
        config.max_position_embeddings = WINDOW
        self.model = transformers.LlamaForCausalLM.from_pretrained(
            folder / "base", config=config, dtype=torch.float32, attn_implementation="eager"
        )
        self.masters = {n: p.detach().clone().requires_grad_() for n, p in self.model.named_parameters()}
        plain = [p for n, p in self.masters.items() if n.endswith(("norm.weight", "bias"))]
        matrices = [p for n, p in self.masters.items() if not n.endswith(("norm.weight", "bias"))]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": plain, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def run(self) -> Steps:
        """All steps, with the evaluations before and after."""
        train = SequenceDataset(self.data, "train")
        order = np.concatenate([epoch_order(SEED, epoch, len(train)) for epoch in range(len(self.rates))])
        before = self.by_position()
        lines = [
            self.step(step, train, order[step * BATCH : (step + 1) * BATCH].tolist(), rate)
            for step, rate in enumerate(self.rates)
        ]
        weights = {n: p.detach().clone() for n, p in self.masters.items()}
        return Steps(lines, weights, {"before": before, "after": self.by_position()})

    def step(self, step: int, train: SequenceDataset, sequences: list[int], rate: float) -> dict[str, float]:
        self._load_masters()
        self.model.zero_grad()
        parts = [self.losses(train, sequence) for sequence in sequences]
        valid = sum(int(mask.sum()) for _, mask in parts)
        loss = sum((losses * mask).sum() for losses, mask in parts) / valid
        loss.backward()
        for name, parameter in self.model.named_parameters():
            self.masters[name].grad = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(self.masters.values()), CLIP)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        tokens = (step + 1) * BATCH * WINDOW
        return {"loss": loss.item(), "grad_norm": norm.item(), "lr": rate, "tokens": tokens, "valid_tokens": valid}

    def losses(self, data: SequenceDataset, sequence: int) -> tuple[Tensor, Tensor]:
        """Loss of every token [L] and which of them count [L]."""
        tokens = torch.from_numpy(data.read(sequence, 0, data.seq_length + 1).astype(np.int64))
        window = data.seq_length
        target = torch.arange(1, window + 1)
        counts = target < data.valid_length(sequence)
        starts = data.document_starts(sequence) if self.documents == "intra" else torch.zeros(1, dtype=torch.int64)
        counts &= ~torch.isin(target, starts)
        position = torch.arange(window)
        document = (position[:, None] >= starts).sum(1)
        allowed = (position[:, None] >= position) & (document[:, None] == document)
        mask = torch.zeros(1, 1, window, window).masked_fill(~allowed, torch.finfo(torch.float32).min)
        logits = self.model(tokens[None, :-1], attention_mask=mask, position_ids=position[None]).logits[0]
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none"), counts.float()

    def by_position(self, folder: Path | None = None, sequences: int = EVALUATED) -> list[float]:
        """Mean held-out loss in sixteen equal parts of the window."""
        self._load_masters()
        data = SequenceDataset(folder or self.data, "eval")
        with torch.no_grad():
            parts = [self.losses(data, i * len(data) // sequences) for i in range(sequences)]
        total = sum((losses * mask).view(16, -1).sum(1) for losses, mask in parts)
        return (total / sum(mask.view(16, -1).sum(1) for _, mask in parts)).tolist()

    def _load_masters(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                master = self.masters[name]
                parameter.copy_(master.bfloat16().float() if self.rounded else master)


def start_of(folder: Path) -> dict[str, Tensor]:
    """Weights before the first step, by Hugging Face name."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return {n: p.detach().clone() for n, p in model.named_parameters()}
