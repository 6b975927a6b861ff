"""megatron-core's self-attention runs on ours, with its recompute, under context and tensor parallelism."""

import functools

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megalong.attention import zigzag
from megalong.attention.core import CoreAttention
from megalong.config.schema import AttentionConfig
from megalong.runtime.errors import LayoutError
from megalong.runtime.ranks import RankPool
from tests.attention.reference import relative_l2

LENGTH, HIDDEN = 64, 32
DOCUMENTS = (0, 9, 32, 50)


def config(cp: int, tp: int, kv_heads: int, **more: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=kv_heads,
        context_parallel_size=cp,
        tensor_model_parallel_size=tp,
        attention_dropout=0.0,
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **more,  # type: ignore[arg-type]
    )


def self_attention(tp: int, cp: int, kv_heads: int, attention: AttentionConfig, recompute: bool) -> list[torch.Tensor]:
    """(output, input gradient) of megatron's SelfAttention, full length, on every rank; weights by one seed."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    selective = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]} if recompute else {}
    local = get_gpt_layer_local_spec().submodules.self_attention.submodules
    layer = SelfAttention(
        config(cp, tp, kv_heads, **selective),
        SelfAttentionSubmodules(
            linear_qkv=local.linear_qkv,
            core_attention=functools.partial(CoreAttention, attention=attention),
            linear_proj=local.linear_proj,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
    )
    group = parallel_state.get_context_parallel_group()
    full = torch.randn(LENGTH, 1, HIDDEN, generator=torch.Generator().manual_seed(3))
    x = zigzag.shard(full, cp, group.rank()).requires_grad_()
    starts = torch.tensor(DOCUMENTS) if attention.document_mask == "intra" else None
    out, _ = layer(x, attention_mask=starts)
    out.sin().sum().backward()
    whole = []
    for local_part in (out.detach(), x.grad):
        assert local_part is not None
        parts = [torch.empty_like(local_part) for _ in range(cp)]
        dist.all_gather(parts, local_part.contiguous(), group=group)
        whole.append(zigzag.unshard(parts))
    return whole


@pytest.mark.parametrize("document_mask", ["none", "intra"])
@pytest.mark.parametrize(("tp", "cp", "kv_heads"), [(1, 4, 2), (2, 2, 2), (4, 1, 2), (2, 2, 1)])
def test_self_attention_is_that_of_one_rank(
    ranks: RankPool, tp: int, cp: int, kv_heads: int, document_mask: str
) -> None:
    attention = AttentionConfig(document_mask=document_mask)
    alone = ranks.run(self_attention, 1, 1, 1, kv_heads, attention, False)[0]
    for recompute in (False, True):
        for together in ranks.run(self_attention, tp * cp, tp, cp, kv_heads, attention, recompute):
            assert max(relative_l2(a, b) for a, b in zip(together, alone, strict=True)) < 2e-6


def recomputed_with_own_documents() -> float:
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model_parallel_cuda_manual_seed(7)
    core = CoreAttention(
        config(2, 1, 2), 1, AttnMaskType.causal, "self", attention=AttentionConfig(document_mask="intra")
    )
    q, k, v = (torch.randn(32, 1, n, 8, requires_grad=True) for n in (4, 2, 2))
    boundaries = [torch.tensor((0, 9)), torch.tensor((0, 33, 50))]

    def grads(call) -> list[torch.Tensor]:
        # both micro-batches forward before either backward, as in a pipeline schedule
        q.grad = k.grad = v.grad = None
        for out in [call(q, k, v, b) for b in boundaries]:
            out.sin().sum().backward()
        return [x.grad for x in (q, k, v) if x.grad is not None]

    plain = grads(core)
    again = grads(lambda *args: tensor_parallel.checkpoint(core, False, *args))
    return max(relative_l2(a, b.double()) for a, b in zip(again, plain, strict=True))


def test_recompute_sees_the_boundaries_of_its_own_micro_batch(ranks: RankPool) -> None:
    assert ranks.run(recomputed_with_own_documents, 2) == [0.0, 0.0]


def boundaries_forgotten() -> bool:
    parallel_state.initialize_model_parallel()
    core = CoreAttention(
        config(1, 1, 2), 1, AttnMaskType.causal, "self", attention=AttentionConfig(document_mask="intra")
    )
    q, k, v = (torch.randn(8, 1, n, 8) for n in (4, 2, 2))
    try:
        core(q, k, v, None)
    except AssertionError as error:
        return "document starts are missing" in str(error)
    return False


def test_a_caller_that_forgets_the_boundaries_is_stopped(ranks: RankPool) -> None:
    assert ranks.run(boundaries_forgotten, 1) == [True]


def refused() -> str:
    parallel_state.initialize_model_parallel(context_parallel_size=4)
    try:
        CoreAttention(config(4, 1, 2), 1, AttnMaskType.causal, "self", cp_comm_type="a2a")
    except LayoutError as error:
        return str(error)
    return ""


def test_heads_that_cannot_be_shared_out_are_refused_with_the_alternative(ranks: RankPool) -> None:
    for said in ranks.run(refused, 4):
        assert "hierarchical_context_parallel_sizes=[2,2]" in said
