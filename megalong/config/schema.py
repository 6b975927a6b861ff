"""Which settings exist, what is each one's type, unit and meaning? One dataclass per group of conf/.

`Config` is the whole tree. Fields typed `X | None` whose docstring says "None: ..." are filled in by
`megalong.recipe.resolve`; after that, and in every `config.yaml` that a run writes, they are set.
"""

# ruff: noqa: RUF009 - the defaults below are `dataclasses.field`s, made by helpers
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megalong.config.cluster import ClusterConfig
from megalong.config.limits import among, number, one_of, within

LONGEST = 2**31 - 1
"""Positions and token ids are int32 in data files and kernels."""
MOST_RANKS = 2**16
"""Along one parallel axis; far above any cluster, low enough to list the layouts of a typing error."""
QUESTIONS = (
    "needle",
    "multi_key",
    "multi_value",
    "multi_query",
    "recall",
    "passkey",
    "variables",
    "common_words",
    "mrcr",
)
"""What can be asked of a window; `megalong.evaluation.tasks` draws them."""


@dataclass
class ModelConfig:
    """Shape of a Llama model, in Hugging Face's names; also what a checkpoint's config.json is read into."""

    name: str = "llama"
    """How reports call it."""
    vocab_size: int = number(128256, at_least=1, at_most=LONGEST)
    """Rows of the embedding as Hugging Face stores it, without padding for tensor parallelism."""
    hidden_size: int = number(4096, at_least=1)
    intermediate_size: int = number(14336, at_least=1)
    """Width of the gated MLP (one of gate and up)."""
    num_hidden_layers: int = number(32, at_least=1, at_most=1024)
    num_attention_heads: int = number(32, at_least=1)
    num_key_value_heads: int = number(8, at_least=1)
    """Key-value heads (grouped-query attention); equals num_attention_heads for multi-head attention."""
    head_dim: int = number(128, at_least=2)
    """Channels per attention head."""
    rms_norm_eps: float = number(1e-5, above=0, at_most=0.1)
    rope_theta: float = number(500000.0, above=1)
    """Rotary base of the base checkpoint."""
    rope_scaling: Any = None
    """Hugging Face rope parameters other than theta: {rope_type, ...}. None: plain rotary embedding."""
    max_position_embeddings: int = number(8192, at_least=1, at_most=LONGEST)
    """Window of the base checkpoint, tokens."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = number(0.02, above=0, at_most=1)
    """Standard deviation of random initial weights."""
    bos_token_id: int | None = number(None, at_least=0, at_most=LONGEST)
    eos_token_id: Any = number(None, at_least=0, at_most=LONGEST)
    """Token id, or list of ids, that ends a text."""


@dataclass
class LayoutConfig:
    """A full parallel layout as a stage asks for it."""

    tp: int = number(1, at_least=1, at_most=MOST_RANKS)
    cp: int = number(1, at_least=1, at_most=MOST_RANKS)
    pp: int = number(1, at_least=1, at_most=MOST_RANKS)
    dp: int = number(1, at_least=1, at_most=MOST_RANKS)


@dataclass
class StageConfig:
    """One stage of the recipe."""

    name: str
    seq_length: int = field(metadata=within(at_least=2, at_most=LONGEST))
    """Window, tokens per sequence."""
    predecessor: str | None
    """Stage whose checkpoint this one starts from; None: the base Hugging Face model."""
    theta_law: str = field(metadata=among("dynamic_ntk", "scaling_law", "unchanged", "fixed"))
    """dynamic_ntk (chained from the predecessor), scaling_law (from the base), unchanged (the predecessor's), fixed."""
    global_batch_size: int = field(metadata=within(at_least=1))
    """Sequences per optimizer step."""
    steps: int = field(metadata=within(at_least=1))
    """Optimizer steps."""
    lr: float = field(metadata=within(above=0, at_most=1))
    """Peak learning rate."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """Wanted layout; its product is the number of GPUs of the stage."""
    theta_factor: float = number(4.0, at_least=1)
    """Factor f of the dynamic-NTK law."""
    theta: float | None = number(None, above=1)
    """Rotary base of this stage. None: from the law. With theta_law=fixed it is required; else it must agree."""
    rope_scaling: Any = None
    """Hugging Face rope dict that this stage trains and exports with, such as {rope_type: yarn}: linear, yarn, llama3,
    longrope, dynamic, or default for none. What it leaves out of factor and original_max_position_embeddings follows
    from the stage's and the base's window. None: that of the weights it starts from."""
    card_minutes: float | None = number(None, above=0)
    """Wall minutes that the published model card reports; for comparison only."""


@dataclass
class ScaleConfig:
    """Fixed divisors that shrink a stage while every code path stays the same."""

    name: str = "full"
    window: int = number(1, at_least=1)
    """Divides every window."""
    steps: int = number(1, at_least=1)
    """Divides the steps of a stage."""
    batch: int = number(1, at_least=1)
    """Divides the global batch size (never below 1)."""
    lr: float | None = number(None, above=0, at_most=1)
    """Learning rate that replaces the stage's. None: the stage's."""


@dataclass
class TopologyConfig:
    """How ranks are shared out between the parallel axes."""

    policy: str = one_of(("stage", "auto"), "stage")
    """stage: the stage's own layout, exactly. auto: the best valid layout for the ranks that are there."""
    tp: int | None = number(None, at_least=1, at_most=MOST_RANKS)
    """Tensor-parallel size. None: chosen by the policy."""
    cp: int | None = number(None, at_least=1, at_most=MOST_RANKS)
    """Context-parallel size (ranks per ring). None: chosen by the policy."""
    pp: int | None = number(None, at_least=1, at_most=MOST_RANKS)
    """Pipeline-parallel size. None: chosen by the policy."""
    dp: int | None = number(None, at_least=1, at_most=MOST_RANKS)
    """Data-parallel size. None: chosen by the policy."""


@dataclass
class AttentionConfig:
    """Which attention is run and how keys and values move between context-parallel ranks."""

    backend: str = one_of(("megalong", "transformer_engine"), "megalong")
    """megalong, or transformer_engine (NVIDIA, extra `gpu`)."""
    kernel: str = one_of(("auto", "cpu_flash", "cuda_flash", "cudnn", "fa3", "reference"), "auto")
    """Block kernel: auto, cpu_flash, cuda_flash, cudnn, fa3 (FlashAttention 3, compute capability 9.0), reference."""
    cp_comm_type: str = one_of(("p2p", "a2a", "a2a+p2p", "all_gather"), "p2p")
    """p2p (ring), a2a (heads), a2a+p2p (heads inside, ring outside), all_gather."""
    hierarchical_context_parallel_sizes: list[int] | None = number(None, at_least=1)
    """For a2a+p2p: [ranks exchanging heads, ranks in the ring]; the product is cp."""
    document_mask: str = one_of(("none", "intra"), "none")
    """none: a sequence is one text. intra: tokens attend only inside their own document."""
    grad_wire_dtype: str = one_of(("fp32", "model"), "fp32")
    """Dtype in which dK and dV travel the ring: fp32, or model (the dtype of the keys)."""
    meters: bool = False
    """Count bytes and exposed waiting of every attention collective."""


@dataclass
class DataConfig:
    """Where training sequences come from."""

    path: str | None = None
    """Folder made by tools/prepare_data.py. None: at mini scale a small corpus of real text is built."""
    loader: str = one_of(("memmap", "dali"), "memmap")
    """memmap, or dali (extra `dali`)."""
    eval_sequences: int = number(2, at_least=0)
    """Held-out sequences read for the loss by position; 0: none, and the run is not evaluated at all."""
    max_passes: int = number(1, at_least=1)
    """How often the run may read each sequence; `tools/prepare_data.py` takes the key for how often it may use a
    document. The corpus that stands in at mini scale is read as often as it takes."""
    allow_tokenizer: str | None = None
    """Name (in the data's manifest) of a tokenizer that may differ from the one the model came with; None: none may."""


@dataclass
class OptimizerConfig:
    """AdamW through megatron's distributed optimizer."""

    adam_beta1: float = number(0.9, at_least=0, below=1)
    adam_beta2: float = number(0.95, at_least=0, below=1)
    adam_eps: float = number(1e-8, above=0, at_most=1)
    weight_decay: float = number(0.0, at_least=0, at_most=10)
    clip_grad: float = number(1.0, at_least=0)
    """Global gradient norm above which gradients are scaled down; 0: never."""
    warmup_steps: int = number(0, at_least=0)
    """Steps of linear warm-up to the learning rate."""
    decay: str = one_of(("constant", "linear", "cosine", "wsd"), "constant")
    """After the warm-up: constant; linear or cosine to min_lr; or wsd, constant until the last wsd_steps."""
    min_lr: float = number(0.0, at_least=0, at_most=1)
    """Learning rate where the decay ends."""
    decay_steps: int | None = number(None, at_least=1)
    """Steps from the first, warm-up included, to the end of the decay. None: the stage's, if there is a decay."""
    wsd_steps: int | None = number(None, at_least=1)
    """Of decay_steps, the last ones, in which wsd decays. None: a tenth, if decay is wsd."""
    wsd_shape: str = one_of(("linear", "cosine", "exponential", "minus_sqrt"), "minus_sqrt")
    """How wsd decays; minus_sqrt: 1 - sqrt(t) (Hägele et al. 2024, arXiv 2405.18392)."""


@dataclass
class TrainConfig:
    """One run of one stage."""

    steps: int | None = number(None, at_least=1)
    """Optimizer steps. None: the stage's."""
    stop_after: int | None = number(None, at_least=1)
    """Save and stop after this many steps of the schedule in all (to split a run); None: at `steps`."""
    lr: float | None = number(None, above=0, at_most=1)
    """Peak learning rate. None: the stage's."""
    global_batch_size: int | None = number(None, at_least=1)
    """Sequences per optimizer step. None: the stage's."""
    recompute: str = one_of(("auto", "none", "selective", "full", "attention_kept"), "auto")
    """What backward computes again: none, selective (attention only), full (every layer), attention_kept (every layer
    but its attention, whose output is kept). auto: what the plan finds fastest and leaves memory to spare."""
    adam: str = one_of(("auto", "transformer_engine", "apex", "torch"), "auto")
    """Who updates the weights. auto: on a GPU the first of them that is installed, on CPU ranks torch."""
    norm: str = one_of(("auto", "apex", "torch"), "auto")
    """Who computes RMSNorm, where not Transformer Engine's layers do. auto: apex on a GPU where it is installed."""
    elementwise: str = one_of(("auto", "triton", "torch"), "auto")
    """Who computes rotation, SwiGLU, torch's RMSNorm and the merge of partial attention. triton: one kernel each, by
    torch.compile. auto: triton on a GPU where it is installed, and not where `deterministic` is set."""
    profile: list[int] | None = number(None, at_least=1)
    """Steps, counted from 1, of which torch's profiler writes a trace into run_dir/profile. None: of none."""
    profile_ranks: list[int] = field(default_factory=lambda: [0], metadata=within(at_least=0, at_most=MOST_RANKS))
    """Ranks whose traces are written."""
    non_finite: str = one_of(("skip", "stop"), "skip")
    """What a loss or gradient that is not finite does: skip (leave the step out and count it) or stop (exit code 2)."""
    max_skipped: int = number(5, at_least=1)
    """Steps in a row that may be left out; then the run stops (exit code 2)."""
    heartbeat_s: float = number(60.0, at_least=1, at_most=86400)
    """Seconds without a sign of life after which a rank counts as lost and the run ends."""
    deterministic: bool = False
    """Operators whose result is the same in every run, also on a GPU, where that costs time."""
    join_s: float = number(600.0, at_least=1, at_most=86400)
    """Seconds that ranks wait for one another at the start."""
    keep_on: str = one_of(("device", "host"), "device")
    """Where a recomputed layer's input and kept attention wait for its backward pass: device, or host (pinned memory,
    copied out and back beside the computation)."""
    mlp_chunk: int | None = number(None, at_least=0)
    """Tokens whose wide MLP intermediate exists at one time, in both passes; 0: all of them. None: 4,096 where a rank
    holds more than 16,384 of a sequence, else all."""
    loss_chunk: int = number(1024, at_least=0)
    """Local tokens whose logits exist at one time; 0: all at once."""


@dataclass
class CheckpointConfig:
    """When and how the run is saved."""

    save_steps: int = number(10, at_least=0)
    """Steps between saves; 0: only at the end."""
    save_minutes: float = number(30.0, at_least=0)
    """Minutes after which a save is due, whatever the step; 0: never."""
    keep: int = number(2, at_least=1)
    """Newest checkpoints kept besides the last of the stage, which stays."""
    asynchronous: bool | None = None
    """Copy to host memory and write beside the training. None: on CUDA."""
    resume: bool = True
    """Continue from the newest whole checkpoint in run_dir when there is one."""
    allow_changed: list[str] = field(default_factory=list)
    """Settings that may differ from the run being resumed though they change what is trained: [train.lr, data.path]."""


@dataclass
class EvaluationConfig:
    """What a run finds out about its model at the start of a stage, on the way and at the end, in its own layout."""

    every_steps: int = number(0, at_least=0)
    """Steps between evaluations; 0: at the start and at the end only."""
    tasks: list[str] = field(default_factory=lambda: ["needle"], metadata=among(*QUESTIONS))
    """Questions (docs/evaluation.md), put with the tokenizer that the weights came with; []: none."""
    lengths: list[int] | None = number(None, at_least=2, at_most=LONGEST)
    """Tokens of a question, at most the window. None: the window."""
    depths: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9], metadata=within(at_least=0, at_most=1))
    """Where the answer stands: 0 at the beginning, 1 at the end."""
    samples: int = number(1, at_least=1, at_most=10_000)
    """Questions of every task, length and depth."""
    haystack: str | None = None
    """Text that answers are hidden in, a file or folder, read over and over. None: a text that comes with megalong."""


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run_dir: str | None = None
    """Folder for everything the run writes. None: runs/<stage>[-<scale>]."""
    init_from: str | None = None
    """Hugging Face directory, Megatron checkpoint, or run_dir of the stage before."""
    searchpath: list[str] = field(default_factory=list)
    """Folders that files were taken from, in order (--config-dir, hydra.searchpath). []: conf/ alone."""
    seed: int = number(1234, at_least=0, at_most=2**32 - 1)
    precision: str = one_of(("bf16", "fp32"), "bf16")
    """bf16 (fp32 master weights and gradients) or fp32."""
