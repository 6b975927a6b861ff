"""Modules with Transformer Engine's signatures that compute with torch, on one tensor-parallel rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, fp8, ops, optimizers, tensor

__all__ = ["distributed", "fp8", "ops", "optimizers", "tensor"]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class _Module(nn.Module):
    def get_extra_state(self) -> Tensor:
        """What is saved of FP8 statistics where there are none."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Of a checkpoint that may have been written without Transformer Engine."""


class Linear(_Module):
    """transformer_engine/pytorch/module/linear.py."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        rng_tracker_name: str | None = None,
        init_method: Any = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert parallel_mode in ("column", "row", None), parallel_mode
        assert params_dtype is not None, "megatron-core says it"
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.in_features = in_features // (self.tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        if init_method is not None:
            init_method(self.weight)
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0  # type: ignore[attr-defined]
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=params_dtype, device=device)) if bias else None

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        """inp [..., in] -> [..., out], and the bias where it is returned."""
        assert self.tp_size == 1, "the stand-in computes on one tensor-parallel rank"
        out = torch.nn.functional.linear(inp, self.weight, None if self.return_bias else self.bias)
        return (out, self.bias) if self.return_bias else out


class LayerNormLinear(Linear):
    """transformer_engine/pytorch/module/layernorm_linear.py."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Any = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel,
            tp_group=tp_group,
            tp_size=tp_size,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
        )
        assert normalization == "RMSNorm", normalization
        assert not zero_centered_gamma
        assert not return_layernorm_output
        self.normalization, self.eps, self.zero_centered_gamma = normalization, eps, zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Any:
        """inp [..., in] -> [..., out] of its norm."""
        return super().forward(_rms_norm(inp, self.layer_norm_weight, self.eps))


class RMSNorm(nn.Module):
    """transformer_engine/pytorch/module/rmsnorm.py and ops/basic/rmsnorm.py."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ) -> None:
        super().__init__()
        assert (normalized_shape is None) != (hidden_size is None)
        assert params_dtype is None or dtype is None
        width, self.eps = normalized_shape or hidden_size, eps
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=params_dtype or dtype))  # type: ignore[arg-type]
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same."""
        return _rms_norm(x, self.weight, self.eps)


class DotProductAttention(_Module):
    """transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert (qkv_format, attn_mask_type, attention_type) == ("sbhd", "causal", "self")
        assert attention_dropout == 0.0
        assert isinstance(kv_channels, int)
        groups = num_gqa_groups or num_attention_heads
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.kv_heads = groups // self.tp_size
        self.scale = softmax_scale or 1.0 / math.sqrt(kv_channels)
        self.cp_group, self.cp_global_ranks, self.cp_comm_type = cp_group, cp_global_ranks, cp_comm_type
        if cp_group is not None:
            assert cp_stream is not None
            assert cp_global_ranks is not None
            assert cp_comm_type in ("p2p", "all_gather", "a2a", "a2a+p2p"), cp_comm_type
            parts = cp_group if cp_comm_type == "a2a+p2p" else [cp_group]
            assert len(parts) == (2 if cp_comm_type == "a2a+p2p" else 1), "[group that trades heads, group of the ring]"
            assert math.prod(part.size() for part in parts) == len(cp_global_ranks)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Any = None,
        bottom_right_diagonal: bool | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool | None = False,
        num_splits: int | None = 1,
        score_mod: Any = None,
        score_mod_bprop: Any = None,
        score_mod_tensors: Any = None,
        score_mod_bprop_tensors: Any = None,
    ) -> Tensor:
        """[S, B, H, D] queries, [S, B, K, D] keys and values -> [S, B, H * D]."""
        assert attn_mask_type in (None, "causal"), attn_mask_type
        assert attention_mask is None, "read only where the mask type is padding or arbitrary: boundaries would be lost"
        assert self.cp_group is None, "the stand-in attends on one context-parallel rank"
        assert key_layer.shape[2] == value_layer.shape[2] == self.kv_heads
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class GroupedLinear(_Module):
    """megatron-core derives a class from it, for experts."""
