"""How is a Llama built on megatron-core for one layout? `build` returns this rank's part, ready to train.

Differences from a plain `GPTModel`: rotary phases of local positions only, a loss that never holds all logits at
once, and vocabulary padding that cannot leak into the softmax.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalong.attention.core import CoreAttention
from megalong.config.schema import Config, ModelConfig
from megalong.model.rotary import LocalRotaryEmbedding
from megalong.model.spec import block_spec
from megalong.rope.frequencies import rotary_frequencies
from megalong.runtime import device


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of the embedding as tensor parallelism cuts it: the next multiple of tp."""
    return math.ceil(vocab_size / tp) * tp


def rope_of(config: Config) -> tuple[Tensor, float]:
    """Inverse frequencies [D/2] fp32 and attention factor for the stage's theta and window."""
    model = config.model
    assert config.stage.theta is not None
    return rotary_frequencies(
        config.stage.theta,
        model.head_dim,
        model.rope_scaling,
        max_position_embeddings=config.stage.seq_length,
        sequence_length=config.stage.seq_length,
    )


def transformer_config(config: Config) -> TransformerConfig:
    """megatron-core's description of the model and of how this run computes it."""
    model, topology, attention = config.model, config.topology, config.attention
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    _, attention_factor = rope_of(config)
    recompute: dict[str, Any] = {}
    if config.train.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.train.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=attention.backend == "transformer_engine" and model.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.initializer_range,
        # cos and sin both carry the attention factor of YaRN and longrope, so scores carry its square
        softmax_scale=attention_factor**2 / math.sqrt(model.head_dim),
        tensor_model_parallel_size=topology.tp or 1,
        pipeline_model_parallel_size=topology.pp or 1,
        context_parallel_size=topology.cp or 1,
        cp_comm_type=attention.cp_comm_type,
        hierarchical_context_parallel_sizes=attention.hierarchical_context_parallel_sizes,
        sequence_parallel=(topology.tp or 1) > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,  # gradients are divided by the global count of valid tokens
        perform_initialization=True,
        use_cpu_initialization=not device.on_cuda(),
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deallocate_pipeline_outputs=True,
        **recompute,
    )


class LlamaModel(GPTModel):
    """`GPTModel` for Llama.

    Args:
        config: what `transformer_config` returns.
        model: shape of the model.
        run: the whole configuration.
    """

    def __init__(self, config: TransformerConfig, run: Config, pre_process: bool, post_process: bool) -> None:
        model, seq_length = run.model, run.stage.seq_length
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, run.attention, config),
            vocab_size=padded_vocab_size(model.vocab_size, run.topology.tp or 1),
            max_sequence_length=seq_length,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
        )
        inv_freq, _ = rope_of(run)
        self.rotary_pos_emb = LocalRotaryEmbedding(
            inv_freq,
            seq_length,
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
        )
        self.real_vocab_size = model.vocab_size
        self.loss_chunk = run.train.loss_chunk

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kwargs)
        return self.token_losses(hidden_states, labels)

    def token_losses(self, hidden_SBH: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of every local token, with the logits of at most `loss_chunk` tokens alive at a time.

        Logits are computed again in backward. Under sequence parallelism hidden states are cut over the
        tensor-parallel ranks, so a chunk takes the same slice of every rank's part.

        Args:
            hidden_SBH: [S / tp, B, hidden] under sequence parallelism, else [S, B, hidden].
            labels_BS: [B, S] token ids.

        Returns:
            losses [B, S] fp32.
        """
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        length, batch = hidden_SBH.shape[:2]
        labels_BPS = labels_BS.view(batch, parts, length)
        chunk = max(1, self.loss_chunk // parts) if self.loss_chunk else length
        if chunk >= length:
            return self._chunk_losses(hidden_SBH, labels_BS, weight)
        losses = []
        for start in range(0, length, chunk):
            labels = labels_BPS[:, :, start : start + chunk].reshape(batch, -1)
            part = checkpoint(
                self._chunk_losses,
                hidden_SBH[start : start + chunk],
                labels,
                weight,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            losses.append(part.view(batch, parts, -1))
        return torch.cat(losses, dim=2).view(batch, parts * length)

    def _chunk_losses(self, hidden_SBH: Tensor, labels_BS: Tensor, weight: Tensor | None) -> Tensor:
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight)
        padding = self.vocab_size - self.real_vocab_size
        if padding:
            logits_SBV = self._without_padding(logits_SBV, padding)
        return self.compute_language_model_loss(labels_BS, logits_SBV)

    def _without_padding(self, logits_SBV: Tensor, padding: int) -> Tensor:
        """Rows that only exist to make the vocabulary divisible get no probability."""
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        width = logits_SBV.size(-1)
        real_here = min(width, max(0, self.real_vocab_size - tp_rank * width))
        if real_here == width:
            return logits_SBV
        fill = logits_SBV.new_full((1,), torch.finfo(logits_SBV.dtype).min).expand(
            *logits_SBV.shape[:2], width - real_here
        )
        return torch.cat((logits_SBV[..., :real_here], fill), dim=-1)


def build(config: Config) -> list[DistributedDataParallel]:
    """This rank's model chunks, wrapped for mixed precision and data parallelism, with random weights.

    Needs megatron's parallel state (`megalong.topology.groups.initialize`). All data- and context-parallel replicas
    hold the same weights.
    """
    model_parallel_cuda_manual_seed(config.seed)
    torch.manual_seed(config.seed)
    megatron_config = transformer_config(config)
    module: torch.nn.Module = LlamaModel(
        megatron_config,
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(device.device())
    if config.precision == "bf16":
        module = Float16Module(megatron_config, module)
    overlap = device.on_cuda()
    wrapped = DistributedDataParallel(
        megatron_config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
        ),
        module,
    )
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        megatron_config.no_sync_func = wrapped.no_sync
    return [wrapped]


def attention_of(model: list[DistributedDataParallel]) -> CoreAttention | None:
    """The core attention of this rank's first layer; None where Transformer Engine computes it."""
    module: Any = model[0]
    while hasattr(module, "module"):
        module = module.module
    core = module.decoder.layers[0].self_attention.core_attention
    return core if isinstance(core, CoreAttention) else None


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the whole model."""
    hidden, heads, kv, dim = model.hidden_size, model.num_attention_heads, model.num_key_value_heads, model.head_dim
    attention = hidden * dim * (2 * heads + 2 * kv) + model.attention_bias * (dim * (heads + 2 * kv) + hidden)
    mlp = 3 * hidden * model.intermediate_size + model.mlp_bias * (2 * model.intermediate_size + hidden)
    embeddings = model.vocab_size * hidden * (1 if model.tie_word_embeddings else 2)
    return model.num_hidden_layers * (attention + mlp + 2 * hidden) + hidden + embeddings
