"""What does the planner have to know of a run? A small frozen summary of the settings, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalong.attention.traffic import Shard
from megalong.config.schema import Config, ModelConfig
from megalong.topology.layout import Layout
from megalong.topology.valid import Demand


@dataclass(frozen=True)
class Workload:
    """One stage on one layout."""

    model: ModelConfig
    layout: Layout
    seq_length: int
    """Window, tokens."""
    global_batch_size: int
    """Sequences per optimizer step."""
    steps: int
    precision: str = "bf16"
    recompute: str = "full"
    loss_chunk: int = 1024
    cp_comm_type: str = "p2p"
    hierarchical_sizes: tuple[int, ...] | None = None
    grad_wire_dtype: str = "fp32"
    device: str = "cuda"
    """cuda or cpu: the trainer overlaps the gradient reduction with backward only on CUDA, and kernels differ."""
    checkpoints: int = 1
    """Checkpoints written during the stage."""

    @property
    def demand(self) -> Demand:
        """What any layout of this run has to serve."""
        return Demand(self.model, self.seq_length, self.global_batch_size, self.cp_comm_type, self.hierarchical_sizes)

    @property
    def local_tokens(self) -> int:
        """Tokens of one sequence on one context-parallel rank."""
        return self.seq_length // self.layout.cp

    @property
    def micro_batches(self) -> int:
        """Micro-batches (of one sequence) per step and replica."""
        return self.global_batch_size // self.layout.dp

    @property
    def layers(self) -> int:
        """Transformer layers of one pipeline stage."""
        return self.model.num_hidden_layers // self.layout.pp

    @property
    def overlap_gradients(self) -> bool:
        """Gradients are reduced while backward still runs, not after it."""
        return self.device == "cuda"

    @property
    def reorders(self) -> bool:
        """The communication library lays the rings of its collectives along the wires: NCCL does, gloo goes by rank."""
        return self.device == "cuda"

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of weights and activations."""
        return 2 if self.precision == "bf16" else 4

    @property
    def inner(self) -> int:
        """Ranks that trade attention heads: 1 for a plain ring."""
        if self.cp_comm_type == "a2a":
            return self.layout.cp
        return self.hierarchical_sizes[0] if self.cp_comm_type == "a2a+p2p" and self.hierarchical_sizes else 1

    @property
    def shard(self) -> Shard:
        """What one rank holds of an attention layer."""
        model, tp = self.model, self.layout.tp
        return Shard(
            tokens=self.local_tokens,
            heads=model.num_attention_heads // tp,
            kv_heads=model.num_key_value_heads // tp,
            head_dim=model.head_dim,
            element_bytes=self.element_bytes,
            wire_bytes=4 if self.grad_wire_dtype == "fp32" else self.element_bytes,
        )

    @property
    def loss_chunks(self) -> int:
        """Pieces in which the loss is computed; 1: all logits at once, and not computed again in backward."""
        parts = self.layout.tp if self.layout.tp > 1 else 1
        length = self.local_tokens // parts
        chunk = max(1, self.loss_chunk // parts) if self.loss_chunk else length
        return -(-length // chunk)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return self.seq_length * self.global_batch_size

    def on(self, layout: Layout, hierarchical_sizes: tuple[int, ...] | None = None) -> Workload:
        """The same run on another layout."""
        return replace(self, layout=layout, hierarchical_sizes=hierarchical_sizes or self.hierarchical_sizes)


def workload_of(config: Config, device: str | None = None) -> Workload:
    """The workload of a resolved configuration.

    Args:
        device: cuda or cpu; None: what the cluster's devices are.
    """
    t = config.topology
    layout = Layout(t.tp or 1, t.cp or 1, t.pp or 1, t.dp or 1)
    steps = config.train.steps or config.stage.steps
    sizes = config.attention.hierarchical_context_parallel_sizes
    every = config.checkpoint.save_steps
    return Workload(
        model=config.model,
        layout=layout,
        seq_length=config.stage.seq_length,
        global_batch_size=config.train.global_batch_size or config.stage.global_batch_size,
        steps=steps,
        precision=config.precision,
        recompute=config.train.recompute,
        loss_chunk=config.train.loss_chunk,
        cp_comm_type=config.attention.cp_comm_type,
        hierarchical_sizes=tuple(sizes) if sizes else None,
        grad_wire_dtype=config.attention.grad_wire_dtype,
        device=device or config.cluster.device,
        checkpoints=-(-steps // every) if every else 1,
    )
