"""How does megatron-core run our attention? `CoreAttention` is the `core_attention` of its layer spec.

It takes the local shard of queries, keys and values, already rotated, and returns the local shard of the output.
Document boundaries come through megatron's `attention_mask` argument: None, or a short CPU int64 tensor of the global
positions at which documents start. A tensor, because recompute hands a layer its own tensors again, so that the
recomputation of an earlier micro-batch sees its own boundaries.

In a layer spec: `core_attention=functools.partial(CoreAttention, attention=config.attention)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megalong.attention import kernels
from megalong.attention.algorithms import Algorithm
from megalong.attention.kept import Kept
from megalong.attention.merge import accumulation_dtype
from megalong.attention.requirements import check
from megalong.attention.tiles import Documents
from megalong.config.schema import AttentionConfig


class CoreAttention(MegatronModule):
    """Causal self-attention over a context-parallel group.

    Args:
        config .. pg_collection: as megatron-core's `DotProductAttention`; `cp_comm_type` wins over `attention`'s.
            `pg_collection.cp` (and `.hcp` for a2a+p2p) are used where given, else megatron's `parallel_state`.
        attention: kernel, algorithm and wire dtype.

    Raises:
        LayoutError: the algorithm cannot share out these heads over this context-parallel size.
        ConfigError: an attention setting is unknown or contradicts another one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        attention: AttentionConfig | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self", attention_type
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal), attn_mask_type
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert not dropout, "attention dropout is not supported: long-context training runs without it"
        self.layer_number = max(1, layer_number)
        self.attention = attention or AttentionConfig()
        self.cp_comm_type = cp_comm_type or self.attention.cp_comm_type
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        if config.apply_query_key_layer_scaling:
            self.scale /= self.layer_number
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.heads = config.num_attention_heads // groups.tp.size()
        self.kv_heads = config.num_query_groups // groups.tp.size()
        check(self.attention, self.kv_heads, groups.cp.size(), self.cp_comm_type)
        self.algorithm = Algorithm(self.cp_comm_type, groups.cp, getattr(groups, "hcp", None) or _hierarchy())
        self._kept: Kept | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, H, D], local tokens and heads of this tensor-parallel rank.
            key, value: [S, B, K, D].
            attention_mask: document starts (int64, global, ascending, the first is 0), or None.

        Returns:
            [S, B, H*D].
        """
        assert attention_bias is None, "attention bias is not supported"
        assert packed_seq_params is None, "documents are given by their starts, not by packed_seq_params"
        kernel = kernels.select(
            self.attention.kernel, query.device, query.dtype, query.shape[-1], self.scale, tokens=query.shape[0]
        )
        documents = self._documents(attention_mask)
        wire = accumulation_dtype(key.dtype) if self.attention.grad_wire_dtype == "fp32" else key.dtype
        out = self.algorithm(query, key, value, documents, kernel, wire, self._kept)
        return out.flatten(2)

    @contextmanager
    def keeping(self, kept: Kept | None) -> Iterator[None]:
        """Within the block, attention goes by way of `kept`."""
        before, self._kept = self._kept, kept
        try:
            yield
        finally:
            self._kept = before

    def _documents(self, starts: torch.Tensor | None) -> Documents:
        if starts is None:  # with document_mask=none they are given where shorter sequences are packed
            assert self.attention.document_mask == "none", "document_mask=intra, but document starts are missing"
            return None
        assert starts.dtype == torch.int64, starts.dtype
        assert starts.dim() == 1, starts.shape
        assert starts[0] == 0, starts[:3]
        assert (starts.diff() > 0).all(), "document starts must ascend"
        return tuple(starts.tolist())


def _hierarchy() -> list[torch.distributed.ProcessGroup] | None:
    """megatron's hierarchical context-parallel groups, where `hierarchical_context_parallel_sizes` was given to it."""
    return parallel_state.get_hierarchical_context_parallel_groups(check_initialized=False)
