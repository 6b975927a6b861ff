"""What does the planner have to know of a run? A small frozen summary of the settings, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megalong.attention.traffic import Shard
from megalong.config.schema import ModelConfig
from megalong.data.alternation import steps_by_window
from megalong.data.manifest import MANIFEST_NAME, read_manifest
from megalong.model.flops import RECOMPUTE, Recompute
from megalong.model.shape import padded_vocab_size
from megalong.run import Run
from megalong.topology.layout import Layout
from megalong.topology.valid import Demand

MANY_TOKENS, MLP_TILE = 16384, 4096
"""A rank with more tokens of a sequence computes the MLP in tiles of so many, unless it is told otherwise."""


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
    """A key of `megalong.model.flops.RECOMPUTE`, or auto: left to the planner."""
    backend: str = "megalong"
    """Who computes attention."""
    keep_on: str = "device"
    mlp_chunk: int | None = 0
    loss_chunk: int = 1024
    cp_comm_type: str = "p2p"
    hierarchical_sizes: tuple[int, ...] | None = None
    grad_wire_dtype: str = "fp32"
    device: str = "cuda"
    """cuda or cpu: the trainer overlaps the gradient reduction with backward only on CUDA, and kernels differ."""
    document_mask: str = "none"
    deterministic: bool = False
    multiprocessors: int = 132
    """Of one device."""
    checkpoints: int = 1
    """Checkpoints written during the stage."""
    attended: int | None = None
    """Tokens that attention keeps together; None: the window. Less where shorter sequences are packed to it."""
    shorter: tuple[tuple[int, int], ...] = ()
    """Windows that some of the steps read instead, and how many steps."""

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

    def with_recompute(self) -> tuple[Workload, ...]:
        """The same run with each policy of recompute that its setting leaves open."""
        if self.recompute != "auto":
            return (self,)
        return tuple(
            replace(self, recompute=policy)
            for policy, again in RECOMPUTE.items()
            if (again.attention or not again.layers or self.backend == "megalong")
            and (again.layers or self.keep_on == "device")
        )

    @property
    def again(self) -> Recompute:
        """What runs forward a second time before its backward."""
        return RECOMPUTE[self.recompute]

    @property
    def keeps_attention(self) -> bool:
        """The first forward pass keeps what attention gave, and the second takes it."""
        return self.again.layers and not self.again.attention

    @property
    def mlp_tile(self) -> int:
        """Tokens of a tile of the MLP; 0: it is computed in one piece. Left open, many tokens are cut."""
        if self.mlp_chunk is not None:
            return self.mlp_chunk
        return MLP_TILE if self.backend == "megalong" and self.local_tokens > MANY_TOKENS else 0

    @property
    def waits_on_host(self) -> bool:
        """What recomputed layers keep leaves the device."""
        return self.again.layers and self.keep_on == "host"

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
    def q_width(self) -> int:
        """Elements of one token's queries on one rank."""
        return self.model.num_attention_heads * self.model.head_dim // self.layout.tp

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys, and of its values, on one rank."""
        return self.model.num_key_value_heads * self.model.head_dim // self.layout.tp

    @property
    def mlp_width(self) -> int:
        """Elements of one token inside the MLP on one rank."""
        return self.model.intermediate_size // self.layout.tp

    @property
    def vocab(self) -> int:
        """Rows of the embedding on one rank, padding included."""
        return padded_vocab_size(self.model.vocab_size, self.layout.tp) // self.layout.tp

    @property
    def shard(self) -> Shard:
        """What one rank holds of an attention layer."""
        return Shard(
            tokens=self.local_tokens,
            heads=self.model.num_attention_heads // self.layout.tp,
            kv_heads=self.model.num_key_value_heads // self.layout.tp,
            head_dim=self.model.head_dim,
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

    def reading(self, window: int) -> Workload:
        """Steps of the same run that read sequences of `window` tokens, packed to its own window."""
        return replace(self, attended=window)

    def on(self, layout: Layout, hierarchical_sizes: tuple[int, ...] | None = None) -> Workload:
        """The same run on another layout."""
        return replace(self, layout=layout, hierarchical_sizes=hierarchical_sizes or self.hierarchical_sizes)


def open_workload(run: Run) -> Workload:
    """The workload of a run before anything was chosen for it that its settings leave to the planner."""
    train = run.config.train
    return replace(workload_of(run), recompute=train.recompute, mlp_chunk=train.mlp_chunk)


def workload_of(run: Run, device: str | None = None) -> Workload:
    """The workload of a run.

    Args:
        device: cuda or cpu; None: what the cluster's devices are.
    """
    config = run.config
    sizes = config.attention.hierarchical_context_parallel_sizes
    every = config.checkpoint.save_steps
    return Workload(
        model=run.model,
        layout=run.layout,
        seq_length=run.seq_length,
        global_batch_size=run.global_batch_size,
        steps=run.steps,
        precision=config.precision,
        recompute=run.recompute,
        backend=config.attention.backend,
        keep_on=config.train.keep_on,
        mlp_chunk=run.mlp_chunk,
        loss_chunk=config.train.loss_chunk,
        cp_comm_type=config.attention.cp_comm_type,
        hierarchical_sizes=tuple(sizes) if sizes else None,
        grad_wire_dtype=config.attention.grad_wire_dtype,
        device=device or config.cluster.device,
        document_mask=config.attention.document_mask,
        deterministic=config.train.deterministic,
        multiprocessors=int(config.cluster.multiprocessors.value),
        checkpoints=-(-run.steps // every) if every else 1,
        shorter=_shorter(run),
    )


def _shorter(run: Run) -> tuple[tuple[int, int], ...]:
    """What the data folder holds besides the window, if it is there by now."""
    folder = run.config.data.path
    if folder is None or not Path(folder, MANIFEST_NAME).is_file():
        return ()
    manifest = read_manifest(Path(folder))
    _, *others = steps_by_window(manifest, run.steps).items()
    return tuple(others) if manifest.seq_length == run.seq_length else ()
