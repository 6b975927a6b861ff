"""A Llama on megatron-core for one layout: `build` returns this rank's part, ready to train.

Differences from a plain `GPTModel`: rotary phases of local positions only, a loss that never holds all logits at
once, and vocabulary padding that cannot leak into the softmax.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalong.attention.core import CoreAttention
from megalong.attention.kernels import with_measured
from megalong.config.schema import AttentionConfig
from megalong.model.head import straight_to_main_grad
from megalong.model.norm import norm_class
from megalong.model.rotary import LocalRotaryEmbedding
from megalong.model.shape import padded_vocab_size
from megalong.model.spec import block_spec
from megalong.rope.frequencies import rotary_frequencies
from megalong.run import Run
from megalong.runtime import device, fused


def rope_of(run: Run) -> tuple[Tensor, float]:
    """Inverse frequencies [D/2] fp32 and attention factor for the stage's theta and window."""
    return rotary_frequencies(
        run.theta,
        run.model.head_dim,
        run.rope_scaling,
        max_position_embeddings=run.seq_length,
        sequence_length=run.seq_length,
    )


def attention_settings(run: Run) -> AttentionConfig:
    """The run's attention settings, with the kernel that its machines were measured to be faster with."""
    config, attention = run.config, run.config.attention
    if not device.on_cuda():
        return attention
    kernel = with_measured(attention.kernel, config.cluster.attention_kernel, config.train.deterministic)
    return replace(attention, kernel=kernel)


def transformer_config(run: Run) -> TransformerConfig:
    """megatron-core's description of the model and of how this run computes it."""
    config, model, layout, attention = run.config, run.model, run.layout, run.config.attention
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    _, attention_factor = rope_of(run)
    recompute: dict[str, Any] = {}
    if run.recompute == "full" and attention.backend == "transformer_engine":
        # the layers of our own spec do it themselves: `recompute.py`
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif run.recompute == "selective":
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
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        cp_comm_type=attention.cp_comm_type,
        hierarchical_context_parallel_sizes=attention.hierarchical_context_parallel_sizes,
        sequence_parallel=layout.tp > 1,
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
        run: of which it is a part.
    """

    def __init__(self, config: TransformerConfig, run: Run, pre_process: bool, post_process: bool) -> None:
        model, seq_length = run.model, run.seq_length
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                model,
                attention_settings(run),
                replace(run.config.train, recompute=run.recompute, mlp_chunk=run.mlp_chunk),
                config,
                norm_class(run.config.train.norm),
            ),
            vocab_size=padded_vocab_size(model.vocab_size, run.layout.tp),
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
            turns=config.params_dtype if fused.in_use() else None,
        )
        self.real_vocab_size = model.vocab_size
        self.loss_chunk = run.config.train.loss_chunk
        self.scoring = False
        """Whether `token_losses` also gives the most likely id: [2, B, S], for evaluation without gradients."""

    def _postprocess(
        self, hidden_states: Tensor, input_ids: Tensor, position_ids: Tensor, labels: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kwargs)
        return self.token_losses(hidden_states, labels)

    def token_losses(self, hidden_SBH: Tensor, labels_BS: Tensor) -> Tensor:
        """Cross-entropy of every local token, with the logits of at most `loss_chunk` tokens alive at a time.

        Logits are computed again in backward, where every chunk adds its share of the weight's gradient to the fp32
        main gradient. Under sequence parallelism hidden states are cut over the
        tensor-parallel ranks, so a chunk takes the same slice of every rank's part.

        Args:
            hidden_SBH: [S / tp, B, hidden] under sequence parallelism, else [S, B, hidden].
            labels_BS: [B, S] token ids.

        Returns:
            losses [B, S] fp32.
        """
        parts = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        length, batch = hidden_SBH.shape[:2]
        labels_BPS = labels_BS.view(batch, parts, length)
        chunk = max(1, self.loss_chunk // parts) if self.loss_chunk else length
        if chunk >= length:
            return self._chunk_losses(hidden_SBH, labels_BS)
        losses = []
        for start in range(0, length, chunk):
            labels = labels_BPS[:, :, start : start + chunk].reshape(batch, -1)
            part = checkpoint(
                self._chunk_losses,
                hidden_SBH[start : start + chunk],
                labels,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            losses.append(part.unflatten(-1, (parts, -1)))
        return torch.cat(losses, dim=-1).flatten(-2)

    def _chunk_losses(self, hidden_SBH: Tensor, labels_BS: Tensor) -> Tensor:
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        # on a pipeline stage that has the embedding too, its gradient arrives the usual way
        weight = straight_to_main_grad(weight, is_all=not (tied and self.pre_process))
        logits_SBV, _ = self.output_layer(hidden_SBH, weight=weight)
        padding = self.vocab_size - self.real_vocab_size
        if padding:
            logits_SBV = self._without_padding(logits_SBV, padding)
        if not self.scoring:
            return self.compute_language_model_loss(labels_BS, logits_SBV)
        best = self._most_likely(logits_SBV)  # first: the loss may write over the logits
        return torch.stack((self.compute_language_model_loss(labels_BS, logits_SBV).float(), best))

    def _most_likely(self, logits_SBV: Tensor) -> Tensor:
        """The id that greedy decoding would take after each token, [B, S] fp32 (exact: ids are below 2**24)."""
        largest, at = logits_SBV.float().max(dim=-1)
        at = (at + parallel_state.get_tensor_model_parallel_rank() * logits_SBV.size(-1)).float()
        if self.config.tensor_model_parallel_size > 1:
            group, here = parallel_state.get_tensor_model_parallel_group(), largest.clone()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            at = torch.where(here == largest, at, torch.inf)
            torch.distributed.all_reduce(at, torch.distributed.ReduceOp.MIN, group=group)
        return at.T

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


def build_module(run: Run) -> torch.nn.Module:
    """This rank's part of the model with random weights, wrapped for mixed precision and without any gradient buffer.

    Needs megatron's parallel state (`megalong.topology.groups.initialize`). All data- and context-parallel replicas
    hold the same weights.
    """
    model_parallel_cuda_manual_seed(run.config.seed)
    torch.manual_seed(run.config.seed)
    fused.choose(run.config.train.elementwise, run.config.train.deterministic)
    megatron_config = transformer_config(run)
    module: torch.nn.Module = LlamaModel(
        megatron_config,
        run,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).to(device.device())
    return Float16Module(megatron_config, module) if run.config.precision == "bf16" else module


def build(run: Run, overlap: bool | None = None) -> list[DistributedDataParallel]:
    """This rank's model chunks as `build_module` makes them, wrapped for data parallelism.

    Args:
        overlap: reduce a bucket of gradients as soon as all of them are there, beside the rest of the backward pass;
            None: on CUDA.
    """
    module = build_module(run)
    megatron_config = get_model_config(module)
    overlap = device.on_cuda() if overlap is None else overlap
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
