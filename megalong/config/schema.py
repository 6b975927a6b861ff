"""Which settings exist, what is each one's type, unit and meaning? One dataclass per group of conf/.

`Config` is the whole tree. Fields typed `X | None` whose docstring says "None: ..." are filled in by
`megalong.config.compose.resolve`; after that, and in every `config.yaml` that a run writes, they are set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megalong.config.cluster import ClusterConfig


@dataclass
class ModelConfig:
    """Shape of a Llama model, in Hugging Face's names; also what a checkpoint's config.json is read into."""

    name: str = "llama"
    """How reports call it."""
    vocab_size: int = 128256
    """Rows of the embedding as Hugging Face stores it, without padding for tensor parallelism."""
    hidden_size: int = 4096
    intermediate_size: int = 14336
    """Width of the gated MLP (one of gate and up)."""
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    """Key-value heads (grouped-query attention); equals num_attention_heads for multi-head attention."""
    head_dim: int = 128
    """Channels per attention head."""
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    """Rotary base of the base checkpoint."""
    rope_scaling: Any = None
    """Hugging Face rope parameters other than theta: {rope_type, ...}. None: plain rotary embedding."""
    max_position_embeddings: int = 8192
    """Window of the base checkpoint, tokens."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    """Standard deviation of random initial weights."""
    bos_token_id: int | None = None
    eos_token_id: Any = None
    """Token id, or list of ids, that ends a text."""


@dataclass
class LayoutConfig:
    """A full parallel layout as a stage asks for it."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1


@dataclass
class StageConfig:
    """One stage of the recipe."""

    name: str
    seq_length: int
    """Window, tokens per sequence."""
    predecessor: str | None
    """Stage whose checkpoint this one starts from; None: the base Hugging Face model."""
    theta_law: str
    """dynamic_ntk (chained from the predecessor), scaling_law (from the base), or fixed."""
    global_batch_size: int
    """Sequences per optimizer step."""
    steps: int
    """Optimizer steps."""
    lr: float
    """Peak learning rate."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Wanted layout; its product is the number of GPUs of the stage."""
    theta_factor: float = 4.0
    """Factor f of the dynamic-NTK law."""
    theta: float | None = None
    """Rotary base of this stage. None: from the law. With theta_law=fixed it is required; else it must agree."""
    card_minutes: float | None = None
    """Wall minutes that the published model card reports; for comparison only."""


@dataclass
class ScaleConfig:
    """Fixed divisors that shrink a stage while every code path stays the same."""

    name: str = "full"
    window: int = 1
    """Divides every window."""
    steps: int = 1
    """Divides the steps of a stage."""
    batch: int = 1
    """Divides the global batch size (never below 1)."""
    lr: float | None = None
    """Learning rate that replaces the stage's. None: the stage's."""


@dataclass
class TopologyConfig:
    """How ranks are shared out between the parallel axes."""

    policy: str = "stage"
    """stage: the stage's own layout, exactly. auto: the best valid layout for the ranks that are there."""
    tp: int | None = None
    """Tensor-parallel size. None: chosen by the policy."""
    cp: int | None = None
    """Context-parallel size (ranks per ring). None: chosen by the policy."""
    pp: int | None = None
    """Pipeline-parallel size. None: chosen by the policy."""
    dp: int | None = None
    """Data-parallel size. None: chosen by the policy."""


@dataclass
class AttentionConfig:
    """Which attention is run and how keys and values move between context-parallel ranks."""

    backend: str = "megalong"
    """megalong, or transformer_engine (NVIDIA, extra `gpu`)."""
    kernel: str = "auto"
    """Block kernel: auto, cpu_flash, cuda_flash, cudnn, reference."""
    cp_comm_type: str = "p2p"
    """p2p (ring), a2a (heads), a2a+p2p (heads inside, ring outside), all_gather."""
    hierarchical_context_parallel_sizes: list[int] | None = None
    """For a2a+p2p: [ranks exchanging heads, ranks in the ring]; the product is cp."""
    document_mask: str = "none"
    """none: a sequence is one text. intra: tokens attend only inside their own document."""
    grad_wire_dtype: str = "fp32"
    """Dtype in which dK and dV travel the ring: fp32, or model (the dtype of the keys)."""
    meters: bool = False
    """Count bytes and exposed waiting of every attention collective."""


@dataclass
class DataConfig:
    """Where training sequences come from."""

    path: str | None = None
    """Folder made by tools/prepare_data.py. None: at mini scale a small corpus of real text is built."""
    loader: str = "memmap"
    """memmap, or dali (extra `dali`)."""
    eval_sequences: int = 2
    """Held-out sequences read for the loss by position, at the start and at the end of a stage; 0: none."""


@dataclass
class OptimizerConfig:
    """AdamW through megatron's distributed optimizer."""

    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the learning rate; constant afterwards."""


@dataclass
class TrainConfig:
    """One run of one stage."""

    steps: int | None = None
    """Optimizer steps. None: the stage's."""
    stop_after: int | None = None
    """Save and stop after this many steps of the schedule in all (to split a run); None: at `steps`."""
    lr: float | None = None
    """Peak learning rate. None: the stage's."""
    global_batch_size: int | None = None
    """Sequences per optimizer step. None: the stage's."""
    recompute: str = "full"
    """Activation recompute: none, selective (attention only), full (every layer)."""
    non_finite: str = "skip"
    """What a loss or gradient that is not finite does: skip (leave the step out and count it) or stop (exit code 2)."""
    heartbeat_s: float = 60.0
    """Seconds without a sign of life after which a rank counts as lost and the run ends."""
    join_s: float = 600.0
    """Seconds that ranks wait for one another at the start."""
    loss_chunk: int = 1024
    """Local tokens whose logits exist at one time; 0: all at once."""


@dataclass
class CheckpointConfig:
    """When and how the run is saved."""

    save_steps: int = 10
    """Steps between saves; 0: only at the end."""
    save_minutes: float = 30.0
    """Minutes after which a save is due, whatever the step; 0: never."""
    keep: int = 2
    """Newest checkpoints kept besides the last of the stage, which stays."""
    asynchronous: bool | None = None
    """Copy to host memory and write beside the training. None: on CUDA."""
    resume: bool = True
    """Continue from the newest whole checkpoint in run_dir when there is one."""
    allow_changed: list[str] = field(default_factory=list)
    """Settings that may differ from the run being resumed though they change what is trained: [train.lr, data.path]."""


@dataclass
class Config:
    """Everything a run is told."""

    stage: StageConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run_dir: str | None = None
    """Folder for everything the run writes. None: runs/<stage>[-<scale>]."""
    init_from: str | None = None
    """Hugging Face directory, Megatron checkpoint, or run_dir of the stage before."""
    seed: int = 1234
    precision: str = "bf16"
    """bf16 (fp32 master weights and gradients) or fp32."""
